"""Samples that do not depend on ranks, restarts or luck, and the files they are kept in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from few import few
from hypothesis import given, strategies as st
from oracle import GaussianData, make_process
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.config import UNetConfig
from guided_diffusion.data.labels import listed_classes
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.runtime.jobs import Job
from guided_diffusion.runtime.labels import parse_classes
from guided_diffusion.runtime.npz import fingerprint, read_npz, save_npz
from guided_diffusion.runtime.pictures import GROUP_GAP, PAD, grid_of_classes, save_grid, save_png, to_uint8
from guided_diffusion.runtime.seeds import image_generator, image_seed, seeded
from guided_diffusion.sample_util import generate, make_shards, merge, preview
from guided_diffusion.sampling.guidance import without_labels
from guided_diffusion.sampling.samplers import make_sampler
from guided_diffusion.script_util import build_unet
from guided_diffusion.unet import UNetModel

STEPS = make_process(100, "4", name="cosine")


def small_unet(num_classes: int = 5, *, dropout: float = 0.0) -> UNetModel:
    """An 8x8 class-conditional U-Net whose weights are random everywhere, also where training starts from zeros."""
    config = UNetConfig(
        image_size=8,
        num_channels=32,
        num_res_blocks=1,
        channel_mult="1,1",
        attention_resolutions="4",
        num_heads=2,
        class_cond=num_classes > 0,
        num_classes=num_classes or 1,
        dropout=dropout,
    )
    generator = th.Generator().manual_seed(0)
    with seeded(0, 0):
        model = build_unet(config, learn_sigma=False)
    for parameter in model.parameters():
        parameter.data += 0.03 * th.randn(parameter.shape, generator=generator)
    return model


class Painter:
    """The perfect network for images that are known: x_0 is what `paint` makes of the keyword arguments."""

    def __init__(self, process: GaussianDiffusion, paint: Callable[..., th.Tensor]) -> None:
        self.levels, self.paint, self.calls = (
            dict(zip(process.timestep_map, process.alphas_cumprod, strict=True)),
            paint,
            0,
        )

    def __call__(self, x: th.Tensor, timesteps: th.Tensor, **kwargs: th.Tensor) -> th.Tensor:
        self.calls += 1
        alpha_bar = th.tensor([self.levels[int(t)] for t in timesteps], dtype=x.dtype).view(-1, 1, 1, 1)
        return (x - alpha_bar.sqrt() * self.paint(**kwargs)) / (1 - alpha_bar).sqrt()


def job(folder: Path, **options: Any) -> Job:
    values: dict[str, Any] = {"sampler": make_sampler("ddpm"), "shape": (3, 8, 8), "num_samples": 7, "batch_size": 3}
    return Job(out_dir=str(folder), **{**values, **options})


def sampled(folder: Path, model: Any, process: GaussianDiffusion = STEPS, **options: Any) -> dict[str, np.ndarray]:
    """What generate() saves for a job."""
    with np.load(generate(process, model, job(folder, **options), device="cpu")) as saved:
        return dict(saved)


@pytest.fixture(scope="module")
def model() -> UNetModel:
    return small_unet()


@pytest.fixture(scope="module")
def whole(model: UNetModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that one process makes without a break."""
    folder = tmp_path_factory.mktemp("whole")
    return Path(generate(STEPS, model, job(folder, num_classes=5))).read_bytes()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_make_the_file_of_one_process(model: UNetModel, whole: bytes, tmp_path: Path, world_size: int) -> None:
    shared = job(tmp_path, num_classes=5)
    for rank in reversed(range(world_size)):
        make_shards(STEPS, model, shared, rank=rank, world_size=world_size)
    merge(shared)
    assert Path(shared.path).read_bytes() == whole


def test_a_damaged_result_is_made_again(model: UNetModel, whole: bytes, tmp_path: Path) -> None:
    one = job(tmp_path, num_classes=5)
    path = Path(generate(STEPS, model, one))
    path.write_bytes(whole[: len(whole) // 2])
    assert Path(generate(STEPS, model, one)).read_bytes() == whole


class Interruption(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("calls", [1, 6, 11])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(
    model: UNetModel, whole: bytes, tmp_path: Path, calls: int
) -> None:
    left = iter(range(calls))

    def stop(*_: Any) -> None:
        if next(left, None) is None:
            raise Interruption

    hook = model.register_forward_pre_hook(stop)
    with pytest.raises(Interruption):
        generate(STEPS, model, job(tmp_path, num_classes=5))
    hook.remove()
    assert not list(tmp_path.glob("*.npz"))
    path = generate(STEPS, model, job(tmp_path, num_classes=5))
    assert Path(path).read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["request.json", "samples.png", os.path.basename(path)]


@pytest.mark.parametrize(
    ("batch_size", "name"), few(product([1, 7, 16], ["ddpm", "ddim", "plms"]), [(1, "ddpm"), (7, "plms"), (16, "ddim")])
)
def test_other_batch_sizes_differ_by_rounding_alone(
    model: UNetModel, tmp_path: Path, name: str, batch_size: int
) -> None:
    options: dict[str, Any] = {"num_classes": 5, "sampler": make_sampler(name)}
    one = sampled(tmp_path / "a", model, **options)
    other = sampled(tmp_path / "b", model, **options, batch_size=batch_size)
    np.testing.assert_array_equal(one["arr_1"], other["arr_1"])
    difference = np.abs(one["arr_0"].astype(int) - other["arr_0"])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def test_an_image_depends_on_its_index_and_seed_alone(model: UNetModel, tmp_path: Path) -> None:
    seven = sampled(tmp_path / "7", model, num_classes=5)
    four = sampled(tmp_path / "4", model, num_classes=5, num_samples=4)
    np.testing.assert_array_equal(seven["arr_0"][:4], four["arr_0"])
    other = sampled(tmp_path / "s", model, num_classes=5, seed=1)
    assert len({image.tobytes() for image in [*seven["arr_0"], *other["arr_0"]]}) == 14


def test_a_guide_that_draws_from_the_global_generator_is_reproducible(tmp_path: Path) -> None:
    def jitter(x: th.Tensor, timesteps: th.Tensor, **_: Any) -> th.Tensor:
        return 0.1 * th.randn_like(x)

    data, kinds = GaussianData(STEPS), []
    for number, state in enumerate((1, 2)):
        th.manual_seed(state)
        before = th.get_rng_state()
        one = job(tmp_path / f"{number}")
        kinds.append(Path(generate(STEPS, data, one, device="cpu", cond_fn=jitter)).read_bytes())
        assert th.equal(th.get_rng_state(), before)
    assert kinds[0] == kinds[1]


def test_dropout_is_off_while_sampling_and_on_afterwards(tmp_path: Path) -> None:
    wet, dry = small_unet(dropout=0.5), small_unet()
    wet.middle_block.eval()
    modes = [module.training for module in wet.modules()]
    np.testing.assert_array_equal(
        sampled(tmp_path / "a", wet, num_classes=5)["arr_0"], sampled(tmp_path / "b", dry, num_classes=5)["arr_0"]
    )
    assert [module.training for module in wet.modules()] == modes


def shade(y: th.Tensor, classes: int = 5) -> th.Tensor:
    """An image of one grey per class."""
    return (2 * y / classes - 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


@pytest.mark.parametrize("labels", [(), (4, 0, 0, 2)])
def test_every_image_is_of_its_label(tmp_path: Path, labels: tuple[int, ...]) -> None:
    painter = Painter(STEPS, lambda y: shade(y))
    saved = sampled(tmp_path, painter, labels=labels, num_classes=5, num_samples=23, batch_size=4)
    expected = to_uint8(shade(th.from_numpy(saved["arr_1"])))
    assert np.abs(saved["arr_0"].astype(int) - expected).max() <= 1
    assert saved["arr_1"].dtype == np.int64
    if labels:
        assert saved["arr_1"].tolist() == [labels[i % 4] for i in range(23)]
    else:
        assert set(saved["arr_1"]) == set(range(5))


def test_conditions_stay_with_their_index(tmp_path: Path) -> None:
    colours = th.linspace(-1, 1, 7)
    painter = Painter(STEPS, lambda tint: tint.view(-1, 1, 1, 1).expand(-1, 3, 8, 8))
    options: dict[str, Any] = {"conditioning": lambda indices: {"tint": colours[list(indices)]}}
    saved = sampled(tmp_path, painter, **options)
    middle = saved["arr_0"].astype(int)[:, 4, 4, 0]
    assert np.abs(middle - to_uint8(colours.view(-1, 1))[:, 0]).max() <= 1


def test_images_start_from_what_is_theirs(tmp_path: Path) -> None:
    """Samples that hardly start at all stay the image of their index; labels reach the function that starts them."""
    shades, seen = th.linspace(-0.9, 0.9, 7), []

    def start(indices: Sequence[int], kwargs: dict[str, th.Tensor]) -> Any:
        seen.append((list(indices), kwargs["y"].tolist()))
        return {"init_image": shades[list(indices)].view(-1, 1, 1, 1).expand(-1, 3, 8, 8), "skip_timesteps": 4}

    painter = Painter(STEPS, lambda y: shade(y))
    saved = sampled(tmp_path, painter, start=start, labels=[0, 1], batch_size=4)
    np.testing.assert_array_equal(saved["arr_0"][:, 4, 4, 0], to_uint8(shades.view(-1, 1))[:, 0])
    assert painter.calls == 0
    assert seen == [([0, 1, 2, 3], [0, 1, 0, 1]), ([4, 5, 6, 6], [0, 1, 0, 1])]


@pytest.mark.parametrize(
    ("shape", "stored"), [((1, 8, 12), (7, 8, 12, 1)), ((2, 6), (7, 6, 2)), ((3, 4, 2, 5), (7, 4, 2, 5, 3))]
)
def test_any_shape_is_stored_channels_last(tmp_path: Path, shape: tuple[int, ...], stored: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"shape": shape}
    saved = sampled(tmp_path, GaussianData(STEPS), **options)
    assert saved["arr_0"].shape == stored
    assert os.path.exists(tmp_path / f"samples_{'x'.join(map(str, stored))}.npz")
    assert os.path.exists(tmp_path / "samples.png") == (len(shape) == 3)


def test_labels_that_do_not_fit_are_refused(model: UNetModel, tmp_path: Path) -> None:
    for options in ({"labels": [0, 5]}, {"num_classes": 6}):
        with pytest.raises(ValueError, match=r"class 5 does not exist: the classes are 0 \.\. 4"):
            sampled(tmp_path, model, **options)
    with pytest.raises(ValueError, match="class-conditional: give labels"):
        sampled(tmp_path, model)
    with pytest.raises(ValueError, match="without_labels"):
        sampled(tmp_path, small_unet(0), labels=[0])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples 0 is below the least value, 1"),
        ({"batch_size": 0}, "batch_size 0 is below the least value, 1"),
        ({"seed": -1}, "seed -1 is below the least value, 0"),
        ({"labels": [-1]}, "class -1 does not exist: the classes are 0 or more"),
        ({"labels": [3], "num_classes": 3}, "class 3 does not exist"),
    ],
)
def test_impossible_jobs_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(tmp_path, **options)


def test_options_that_the_job_decides_are_refused(model: UNetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no option model_kwargs"):
        generate(STEPS, model, job(tmp_path, num_classes=5), model_kwargs={"y": th.zeros(3)})


def test_class_lists() -> None:
    names = ["cat", "dog", "7"]
    assert parse_classes("2, 0", 3) == [2, 0]
    assert parse_classes("dog,1,cat", 3, names) == [1, 1, 0]
    assert parse_classes(",".join(["dog"] * 30000), 3, names) == [1] * 30000
    with pytest.raises(ValueError, match=r"class 7 does not exist: the classes are 0 \.\. 2"):
        parse_classes("7", 3, names)
    with pytest.raises(ValueError, match="class 'cow' is unknown: the names are cat, dog"):
        parse_classes("cow", 3, names)
    with pytest.raises(ValueError, match="class 'cow' is unknown: there is no"):
        parse_classes("cow", 3)


def test_a_file_lists_classes_line_by_line(tmp_path: Path) -> None:
    names, path = ["a, b", "a", "b"], tmp_path / "classes.txt"
    path.write_text("a\n\n b \na, b\n1,2\n")
    assert listed_classes(f"@{path}", 3, names) == [1, 2, 0, 1, 2]
    assert listed_classes("a,b", 3, names) == [0]
    path.write_text("a\ncow\n")
    with pytest.raises(ValueError, match="class 'cow' is unknown"):
        listed_classes(f"@{path}", 3, names)
    path.write_text(" \n")
    with pytest.raises(ValueError, match="holds no class: write one on each line"):
        listed_classes(f"@{path}", 3)
    with pytest.raises(ValueError, match="give a file with a class on each line"):
        listed_classes(f"@{tmp_path / 'nothing'}", 3)
    with pytest.raises(ValueError, match="class '@"):
        parse_classes(f"@{path}", 3, names)  # what a browser sends reads no file


def test_names_of_classes_may_hold_commas() -> None:
    names = ["tench, Tinca tinca", "cock", "great grey owl, great gray owl, Strix nebulosa", "Tinca tinca, cock"]
    assert parse_classes("tench, Tinca tinca", 4, names) == [0]
    assert parse_classes("3,tench,Tinca tinca , 1,great grey owl,great gray owl,Strix nebulosa,cock", 4, names) == [
        *(3, 0, 1, 2, 1)
    ]
    with pytest.raises(ValueError, match="class 'tench' is unknown: the names are tench, Tinca tinca, cock"):
        parse_classes("tench", 4, names)
    with pytest.raises(ValueError, match="class 'Tinca tinca' is unknown"):
        parse_classes("Tinca tinca, 1", 4, names)
    assert parse_classes("a, b, 1", 3, ["a", "b", "a, b"]) == [2, 1]
    assert parse_classes("2,0,1", 3, ["a", "b", "a, b"]) == [2, 0, 1]


def test_another_request_in_the_folder_is_refused(model: UNetModel, tmp_path: Path) -> None:
    request = {"weights": "a"}
    path = generate(STEPS, model, job(tmp_path, num_classes=5, request=request))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    others: list[tuple[dict[str, Any], str]] = [
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"batch_size": 2}, "batch_size was 3 and is 2"),
        ({"num_samples": 8}, "num_samples was 7 and is 8"),
        ({"labels": [1]}, r"labels was \[\] and is \[1\]"),
        ({"sampler": make_sampler("ddim")}, r"sampler was Ancestral\(\) and is DDIM\(eta=0.0\)"),
        ({"request": {"weights": "b"}}, "weights was a and is b"),
    ]
    for options, message in others:
        with pytest.raises(ValueError, match=message):
            sampled(tmp_path, model, **{"num_classes": 5, "request": request, **options})
    with pytest.raises(ValueError, match="clip_denoised was True and is False"):
        generate(STEPS, model, job(tmp_path, num_classes=5, request=request), clip_denoised=False)
    with pytest.raises(ValueError, match="steps was 4 and is 5"):
        generate(make_process(100, "5"), model, job(tmp_path, num_classes=5, request=request))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    assert path in map(str, tmp_path.iterdir())


def test_a_finished_request_is_not_sampled_again(tmp_path: Path) -> None:
    painter = Painter(STEPS, lambda: th.zeros(1))
    path = generate(STEPS, painter, job(tmp_path), device="cpu")
    calls, content = painter.calls, Path(path).read_bytes()
    again = job(tmp_path, save_images=True)
    assert generate(STEPS, painter, again, device="cpu") == path
    assert painter.calls == calls == 12
    assert Path(path).read_bytes() == content
    assert len(os.listdir(tmp_path / "images")) == 7


def test_images_and_grid_show_the_samples(tmp_path: Path) -> None:
    painter = Painter(STEPS, lambda y: shade(y))
    options: dict[str, Any] = {"labels": [3, 1], "num_samples": 6, "class_names": ["a", "b", "c", "deer", "e"]}
    saved = sampled(tmp_path, painter, save_images=True, **options)
    assert sorted(os.listdir(tmp_path / "images")) == [f"{i:06d}_y{[3, 1][i % 2]}.png" for i in range(6)]
    for index, image in enumerate(saved["arr_0"]):
        with Image.open(tmp_path / "images" / f"{index:06d}_y{[3, 1][index % 2]}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), image)
    with Image.open(tmp_path / "samples.png") as picture:
        grid = np.asarray(picture)[PAD:-PAD, -(3 * 64 + 3 * PAD) : -PAD]  # three columns, without the names
    for index, image in enumerate(saved["arr_0"]):
        top, left = index % 2 * (64 + PAD), index // 2 * (64 + PAD)
        np.testing.assert_array_equal(grid[top : top + 64, left : left + 64], image.repeat(8, 0).repeat(8, 1))


def test_samples_of_one_colour_are_reported_once(tmp_path: Path) -> None:
    logger.configure(str(tmp_path / "log"), format_strs=["log"])
    saved = sampled(tmp_path / "out", Painter(STEPS, lambda: th.zeros(1, 1, 1, 1)))
    assert len(np.unique(saved["arr_0"])) == 1
    text = (tmp_path / "log" / "log.txt").read_text()
    assert text.count("of one colour") == 1
    assert "3 of the 3 samples of batch 0" in text


def test_samples_that_are_not_finite_end_the_run_which_goes_on_later(tmp_path: Path) -> None:
    calls: list[int] = []

    def paint() -> th.Tensor:
        calls.append(0)
        return th.full((1, 1, 1, 1), math.nan if STEPS.num_timesteps < len(calls) <= 2 * STEPS.num_timesteps else 0.5)

    with pytest.raises(
        ValueError, match="3 of the 3 samples of batch 1 have values that are not finite, and no result"
    ):
        sampled(tmp_path, Painter(STEPS, paint))
    assert not list(tmp_path.glob("*.npz"))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["000000.npz"]
    assert sampled(tmp_path, Painter(STEPS, paint))["arr_0"].shape[0] == 7


@pytest.mark.parametrize(
    ("clipped", "words"), [(None, "where they were clipped"), (False, "give True if images are blots")]
)
@pytest.mark.parametrize(("size", "told"), [(1e-5, 0), (1.0, 1)])
def test_guidance_that_leaves_the_range_is_told_once(
    tmp_path: Path, clipped: bool | None, words: str, size: float, told: int
) -> None:
    logger.configure(str(tmp_path / "log"), format_strs=["log"])
    shared = job(tmp_path / "out", sampler="dpm++2m")
    guide = lambda x, timesteps, **_: th.full_like(x, size)  # noqa: E731
    painter = Painter(STEPS, lambda: th.zeros(1, 1, 1, 1))
    make_shards(STEPS, painter, shared, cond_fn=guide, clip_guided=clipped, device="cpu")
    text = (tmp_path / "log" / "log.txt").read_text()
    line = "guidance moved 100% of the values of a predicted x_0 far out of [-1, 1], "
    assert text.count(line) == text.count(words) == told


def test_a_film_is_made_of_the_first_batch_and_of_no_other(model: UNetModel, tmp_path: Path) -> None:
    shared = job(tmp_path, num_classes=5, film=2)
    make_shards(STEPS, model, shared, rank=1, world_size=2)
    assert not (tmp_path / "film.gif").exists()
    make_shards(STEPS, model, shared, rank=0, world_size=2)
    with Image.open(tmp_path / "film.png") as strip:
        assert strip.size[0] == 3 * (64 + PAD) + PAD  # steps 1 and 3, and the image
    made = os.stat(tmp_path / "film.gif").st_mtime_ns
    os.remove(shared.shard(2))
    make_shards(STEPS, model, shared)
    assert os.stat(tmp_path / "film.gif").st_mtime_ns == made
    merge(shared)


def test_a_film_changes_no_sample_and_calls_others_back(model: UNetModel, whole: bytes, tmp_path: Path) -> None:
    seen: list[int] = []
    options: Any = {"callback": lambda index, output: seen.append(index)}
    path = generate(STEPS, model, job(tmp_path, num_classes=5, film=1), **options)
    assert "callback" not in json.loads((tmp_path / "request.json").read_text())
    assert Path(path).read_bytes() == whole
    assert seen == 3 * [3, 2, 1, 0]


def test_a_film_that_comes_too_late_is_not_made(model: UNetModel, tmp_path: Path) -> None:
    logger.configure(str(tmp_path / "log"), format_strs=["log"])
    generate(STEPS, model, job(tmp_path, num_classes=5))
    generate(STEPS, model, job(tmp_path, num_classes=5, film=1))
    assert not (tmp_path / "film.gif").exists()
    assert "no film: the images that it shows are made already" in (tmp_path / "log" / "log.txt").read_text()


def test_films_of_what_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shape": (2, 8, 8), "film": 1}
    with pytest.raises(ValueError, match=r"no film can show images of shape \(2, 8, 8\)"):
        sampled(tmp_path, GaussianData(STEPS), **options)


def test_a_preview_disturbs_nothing_and_repeats(tmp_path: Path) -> None:
    model, process = small_unet(dropout=0.5), make_process(100)
    model.out.eval()
    modes, state = [module.training for module in model.modules()], th.get_rng_state()
    path = str(tmp_path / "deep" / "grid.png")
    images = [preview(process, model, (6, 3, 8, 8), labels=[0, 1, 2], seed=seed, path=path) for seed in (0, 0, 1)]
    assert th.equal(th.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    with Image.open(path) as picture:
        assert picture.size == (3 * 66 + PAD, 2 * 66 + PAD)


@pytest.mark.parametrize(("respacing", "fed"), [("", 25), ("10", 10), ("50", 25)])
def test_a_preview_takes_few_steps_of_the_process_it_is_given(tmp_path: Path, respacing: str, fed: int) -> None:
    process, seen = make_process(1000, respacing), []
    data = GaussianData(process)

    def watch(x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        seen.append(int(timesteps[0]))
        return data(x, timesteps)

    network = without_labels(watch)
    images = preview(process, small_of(network), (64, 3, 8, 8), labels=[], seed=0, path=str(tmp_path / "grid.png"))
    assert len(seen) == fed
    assert set(seen) <= set(process.timestep_map)
    assert (seen[0], seen[-1]) == (max(process.timestep_map), 0)
    assert abs(images.mean() / 127.5 - 1 - 0.3) < 0.03


def small_of(network: Callable[..., th.Tensor]) -> th.nn.Module:
    """A function as a module."""

    class Wrapped(th.nn.Module):
        def forward(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
            return network(x, timesteps)

    return Wrapped()


@given(st.integers(0, 2**70), st.integers(0, 2**20), st.integers(0, 2**20))
def test_no_two_images_of_a_run_share_a_seed(seed: int, one: int, other: int) -> None:
    mask = 2**32 - 1  # what torch's CPU generator looks at
    assert (image_seed(seed, one) & mask == image_seed(seed, other) & mask) == (one == other)
    assert 0 <= image_seed(seed, one) < 2**63


def test_neighbouring_seeds_share_no_image() -> None:
    seeds = [image_seed(seed, index) for seed in range(20) for index in range(200)]
    assert len({value % 2**32 for value in seeds}) == len(seeds)
    noise = th.stack([th.randn(16, generator=image_generator(s, i)) for s in range(10) for i in range(50)])
    assert noise.mean().abs() < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert th.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.95


def test_batches_have_global_streams_of_their_own() -> None:
    draws = []
    before = th.get_rng_state()
    for seed, batch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        with seeded(seed, batch):
            draws.append(th.rand(4))
    assert th.equal(th.get_rng_state(), before)
    assert th.equal(draws[0], draws[3])
    assert len({tuple(draw.tolist()) for draw in draws}) == 3


def test_uint8_is_clamped_and_truncated() -> None:
    x = th.tensor([-3.0, -1.0, -0.9999, 0.0, 1 / 127.5, 0.999, 1.0, 7.0, math.nan, math.inf, -math.inf])
    levels = to_uint8(x.view(1, 1, -1, 1)).ravel()
    assert levels.tolist() == [0, 0, 0, 127, 128, 254, 255, 255, 0, 255, 0]
    noise = th.randn(2, 3, 5, 7)
    np.testing.assert_array_equal(to_uint8(noise), ((noise + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1))


def test_arrays_survive_the_npz_and_give_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (10, 4, 3)).astype(np.uint8), np.arange(10), rng.standard_normal((10, 2))]
    paths = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    save_npz(paths[0], *arrays)
    save_npz(paths[1], *((a.shape, a.dtype, [a[i : i + 3] for i in range(0, 10, 3)]) for a in arrays))
    assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
    with np.load(paths[0]) as saved:
        for number, array in enumerate(arrays):
            np.testing.assert_array_equal(saved[f"arr_{number}"], array, strict=True)
    np.savez(tmp_path / "numpy.npz", *arrays)
    for path in (paths[0], str(tmp_path / "numpy.npz")):
        chunks = list(read_npz(path, "arr_0", 4))
        assert [len(chunk) for chunk in chunks] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate(chunks), arrays[0], strict=True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    save_npz(path, np.arange(3))

    def broken() -> Any:
        yield np.arange(2)
        raise Interruption

    with pytest.raises(Interruption):
        save_npz(path, ((3,), np.int64, broken()))
    with np.load(path) as saved:
        assert saved["arr_0"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["a.npz"]


def test_fingerprints_tell_values_shapes_types_and_names_apart() -> None:
    ones = th.ones(2, 3)
    variants = [{"a": ones}, {"b": ones}, {"a": ones.view(3, 2)}, {"a": ones.double()}, {"a": ones * 2}]
    assert len({fingerprint(variant) for variant in variants}) == 5
    assert fingerprint({"a": ones.T.contiguous().T}) == fingerprint({"a": ones}) == fingerprint({"a": ones.numpy()})


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_grid_shows_every_image_in_its_place(tmp_path: Path, channels: int, mode: str) -> None:
    rng, path = np.random.default_rng(0), str(tmp_path / "grid.png")
    images = rng.integers(0, 256, (5, 8, 10, channels)).astype(np.uint8)
    save_grid(path, images, 2, zoom=1)
    with Image.open(path) as picture:
        assert picture.mode == mode
        grid = np.asarray(picture).reshape(picture.height, picture.width, channels)
    assert grid.shape == (3 * 10 + PAD, 2 * 12 + PAD, channels)
    for index, image in enumerate(images):
        top, left = PAD + index // 2 * 10, PAD + index % 2 * 12
        np.testing.assert_array_equal(grid[top : top + 8, left : left + 10], image)
    assert (grid[-10:-PAD, -12:-PAD] == 255).all()


def test_names_and_titles_lie_beside_the_images(tmp_path: Path) -> None:
    path, images = str(tmp_path / "grid.png"), np.full((8, 32, 32, 3), 128, np.uint8)
    save_grid(path, images, 4, ["smileys", "flags \u2691 " + 40 * "x"], titles=["unguided", "guided"], zoom=1)
    with Image.open(path) as picture:
        dark = np.asarray(picture.convert("L")) < 100
        grey = np.asarray(picture.convert("L")) == 128
    rows, columns = np.where(grey.any(axis=1))[0], np.where(grey.any(axis=0))[0]
    assert rows[-1] - rows[0] + 1 == 2 * 32 + PAD
    assert columns[-1] - columns[0] + 1 == 4 * 32 + 3 * PAD + GROUP_GAP
    assert not dark[rows[0] :, columns[0] :].any()
    names, titles = dark[rows[0] :, : columns[0]], dark[: rows[0], columns[0] :]
    assert all(names[start : start + 32].any() for start in (0, 34))
    assert all(half.any() for half in np.array_split(titles, 2, axis=1))


def test_classes_with_one_image_each_stand_below_it() -> None:
    images, names = np.full((5, 64, 64, 3), 128, np.uint8), ["cat", "golden retriever, from above", "owl", "", "fox"]
    plain, named = (np.asarray(grid_of_classes(images, turns, names).convert("L")) for turns in ([], [1, 2, 0, 4, 7]))
    assert named.shape[0] > plain.shape[0]
    assert (named == 128).sum() >= (plain == 128).sum()  # no image is covered
    height = (named.shape[0] - PAD) // 2
    dark = [
        (named[row * height + PAD + 64 :][: height - 64, column * 66 :][:, :66] < 100).sum()
        for row, column in np.ndindex(2, 3)
    ]
    assert all(dark[:5])
    assert dark[0] > dark[1]  # by the length of its name
    assert dark[5] == 0


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((4, 8, 8, 2), np.uint8), {}, "C = 1, 3 or 4"),
        (np.zeros((4, 8, 8, 3), np.float32), {}, "cannot be drawn"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "0 images, 2 columns"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"titles": ["a", "b", "c"]}, "3 titles"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"row_names": ["a"]}, "1 names: no grid"),
    ],
)
def test_impossible_grids_are_refused(
    tmp_path: Path, images: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_grid(str(tmp_path / "grid.png"), images, 2, **options)
    assert not os.listdir(tmp_path)


def test_png_round_trip(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 5, 1)).astype(np.uint8)
    save_png(str(tmp_path / "a.png"), image)
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), image[..., 0])


def test_the_request_is_readable(model: UNetModel, tmp_path: Path) -> None:
    generate(STEPS, model, job(tmp_path, labels=[i % 5 for i in range(100)], request={"cfg": 2.5}))
    request = json.loads((tmp_path / "request.json").read_text())
    assert request["cfg"] == 2.5
    assert request["shape"] == [3, 8, 8]
    assert len(request["labels"]) == 16
