"""Likelihoods against closed forms; and the command that measures folders: every image once, whoever measures it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from few import few
from oracle import GaussianData, make_process
from PIL import Image
from ranks import Nursery
from test_docs import run as run_snippet, snippets

import mixture
from guided_diffusion.commands import flags as cli, image_nll
from guided_diffusion.commands.common import restore
from guided_diffusion.config import DiffusionConfig, FlowConfig, UNetConfig
from guided_diffusion.evaluation.flow_likelihood import calc_flow_bpd
from guided_diffusion.evaluation.likelihood import Survey, carry_out, measure_batches, merge
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.losses import HALF_BIN
from guided_diffusion.runtime.files import write_json
from guided_diffusion.runtime.npz import save_npz
from guided_diffusion.runtime.options import defaults
from guided_diffusion.runtime.seeds import image_generator
from guided_diffusion.script_util import build_unet
from guided_diffusion.training import checkpoints

SHAPE = (5, 3, 4, 4)
SIZE = math.prod(SHAPE[1:])
MEAN, STD = 0.1, 0.3
PRECISE = FlowConfig(flow_tolerance=1e-6)
HEUN = FlowConfig(flow_solver="heun")


def pixels(shape: tuple[int, ...] = SHAPE, dtype: th.dtype = th.float64) -> th.Tensor:
    """Gaussian images of 8 bits."""
    x = th.randn(shape, generator=th.Generator().manual_seed(0), dtype=th.float64) * STD + MEAN
    return ((x.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1).to(dtype)


def generators(count: int, seed: int = 0) -> list[th.Generator]:
    return [image_generator(seed, index) for index in range(count)]


def bits_of_bins(x: th.Tensor) -> th.Tensor:
    """-log2 of the probability of the bins under the data's own distribution, per dimension [N]."""
    normal = th.distributions.Normal(MEAN, STD)
    return -th.log2(normal.cdf(x + HALF_BIN) - normal.cdf(x - HALF_BIN)).flatten(1).mean(dim=1)


class BestVariance:
    """The Gaussian oracle with the variance of p(x_{t-1} | x_t) beside the mean."""

    def __init__(self, process: GaussianDiffusion, dtype: th.dtype = th.float64) -> None:
        self.data, alpha_bar = GaussianData(process, MEAN, STD), process.alphas_cumprod
        unknown = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
        best = np.log(process.posterior_variance + process.posterior_mean_coef1**2 * unknown)
        self.log_variance = th.from_numpy(best).to(dtype)

    def __call__(self, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        rows = timesteps.round().long()
        return th.cat([self.data(x, timesteps), self.log_variance[rows].view(-1, 1, 1, 1).expand_as(x)], dim=1)


PROCESSES: list[dict[str, Any]] = [
    {"mean": "EPSILON"},
    {"mean": "START_X", "name": "cosine"},
    {"mean": "VELOCITY", "zero_terminal_snr": True},
    {"mean": "PREVIOUS_X"},
]


def exact_bits(process: GaussianDiffusion, data: GaussianData, x: th.Tensor) -> th.Tensor:
    """Bits of points x at the first level: the flow is affine, and its end is a standard normal."""
    first, last = process.alphas_cumprod[[0, -1]]
    end = data.flow(x, first, last)
    growth = 0.5 * math.log((last * STD**2 + 1 - last) / (first * STD**2 + 1 - first))
    log_density = (-0.5 * (end**2 + math.log(2 * math.pi)) + growth).flatten(1).mean(dim=1)
    return -log_density / math.log(2) - math.log2(2 * HALF_BIN)


@pytest.mark.parametrize(("dtype", "allowed"), [(th.float64, 1e-6), (th.float32, 1e-5)])
@pytest.mark.parametrize("kind", PROCESSES, ids=lambda kind: kind["mean"])
def test_the_flow_of_gaussian_data_has_the_density_of_the_affine_map(
    kind: dict[str, Any], dtype: th.dtype, allowed: float
) -> None:
    process = make_process(1000, **kind)
    data, x = GaussianData(process, MEAN, STD), pixels(dtype=dtype)
    out = calc_flow_bpd(process, data, x, False, options=PRECISE, generator=generators(5))
    noise = th.stack([th.rand(SHAPE[1:], generator=generator, dtype=dtype) for generator in generators(5)])
    wanted = exact_bits(process, data, (x + (2 * noise - 1) * HALF_BIN).double())
    assert (out["total_bpd"] - wanted).abs().max() < allowed
    parts = out["prior_bpd"] + out["volume_bpd"] + out["data_bpd"]
    th.testing.assert_close(out["total_bpd"], parts)
    assert int(out["evaluations"].max()) < 150


def bound(process: GaussianDiffusion, model: Callable[..., th.Tensor], x: th.Tensor) -> dict[str, th.Tensor]:
    return process.calc_bpd_loop(model, x, False)


def flow(options: FlowConfig) -> Callable[..., dict[str, th.Tensor]]:
    return lambda process, model, x: calc_flow_bpd(process, model, x, False, options=options, generator=generators(3))


MEASURES = {"vlb": bound} | {
    f"{dequantize} {options.flow_solver}": flow(replace(options, dequantize=dequantize))
    for dequantize in ("uniform", "decoder")
    for options in (PRECISE, HEUN)
}


@pytest.mark.parametrize("name", few(MEASURES, ["vlb", "uniform rk45", "decoder rk45"]))
def test_every_measure_of_the_best_network_is_the_probability_of_the_bins(name: str) -> None:
    """Image by image, over whose pixels the noise of the measures evens out."""
    process = make_process(200, var="LEARNED")
    x = pixels((3, 3, 32, 32))
    total = MEASURES[name](process, BestVariance(process), x)["total_bpd"]
    assert (total - bits_of_bins(x)).abs().max() < (0.04 if name == "vlb" else 0.01)


@pytest.mark.slow
def test_the_flow_of_a_mixture_has_its_density() -> None:
    """Its Jacobian is not diagonal, so that the probes matter: they are right on average."""
    process, data = make_process(1000, "logsnr100"), mixture.ring()
    points, _ = data.sample(1000, th.Generator().manual_seed(0))
    options, generator = FlowConfig(flow_solver="heun", probes=8), th.Generator().manual_seed(1)
    network = mixture.Oracle(process, data)
    out = calc_flow_bpd(process, network, points, False, options=options, generator=generator)["total_bpd"]
    noise = th.rand(points.shape, dtype=th.float64, generator=generator.manual_seed(1))
    level = math.log(process.alphas_cumprod[0])
    log_density = data.log_likelihood(points + (2 * noise - 1) * HALF_BIN, level) / 2
    difference = out + log_density / math.log(2) + math.log2(2 * HALF_BIN)
    error = float(difference.std()) / math.sqrt(len(points))
    assert abs(float(difference.mean())) < 4 * error
    assert error < 0.01


def bent(x: th.Tensor, timesteps: th.Tensor, mix: th.Tensor) -> th.Tensor:
    """A network whose pixels all depend on each other."""
    return th.tanh(x.flatten(1) @ mix + timesteps[:, None] / 500).view_as(x)


@pytest.fixture
def network() -> Callable[..., th.Tensor]:
    mix = th.randn(SIZE, SIZE, generator=th.Generator().manual_seed(3), dtype=th.float64) / 8
    return partial(bent, mix=mix)


@pytest.mark.parametrize("noise", few(["rademacher", "gaussian"], ["rademacher"]))
def test_probes_are_right_on_average(noise: str, network: Callable[..., th.Tensor]) -> None:
    """Against the Jacobian of one step of Heun's method, whose divergences are those of its two ends."""
    process = make_process(1000, "list:500,520", mean="START_X")
    x, count = pixels((1, *SHAPE[1:])), 2000
    options = FlowConfig(flow_solver="heun", probe_noise=noise, probes=count)
    x_many = calc_flow_bpd(process, network, x, False, options=options, generator=generators(1))
    start = x + (2 * th.rand(x.shape[1:], generator=generators(1)[0], dtype=th.float64) - 1) * HALF_BIN
    angles = [math.acos(math.sqrt(level)) for level in process.alphas_cumprod]

    def velocity(x: th.Tensor, index: int) -> th.Tensor:
        t = th.tensor([float(process.timestep_map[index])], dtype=th.float64)
        return (math.cos(angles[index]) * x - network(x, t)) / math.sin(angles[index])

    def divergence(x: th.Tensor, index: int) -> float:
        jacobian = th.autograd.functional.jacobian(lambda x: velocity(x, index), x).view(SIZE, SIZE)
        return float(jacobian.trace())

    length = angles[1] - angles[0]
    volume = length / 2 * (divergence(start, 0) + divergence(start + length * velocity(start, 0), 1))
    assert float(x_many["volume_bpd"]) == pytest.approx(-volume / SIZE / math.log(2), abs=0.002)
    one = replace(options, probes=1)
    apart = [calc_flow_bpd(process, network, x, False, options=one, generator=generators(1, seed)) for seed in (1, 2)]
    assert apart[0]["volume_bpd"] != apart[1]["volume_bpd"]


@pytest.mark.slow
def test_solvers_have_their_orders(network: Callable[..., th.Tensor]) -> None:
    def bits(grid: str, options: FlowConfig) -> th.Tensor:
        process = make_process(1000, grid, mean="START_X")
        return calc_flow_bpd(process, network, pixels(), False, options=options, generator=generators(5))["total_bpd"]

    exact = bits("", replace(PRECISE, flow_tolerance=1e-9))
    heun = [float((bits(f"logsnr{steps}", HEUN) - exact).abs().max()) for steps in (60, 240)]
    assert 1.8 < math.log2(heun[0] / heun[1]) / 2 < 2.3
    for tolerance in (1e-3, 1e-5, 1e-7):
        off = (bits("", FlowConfig(flow_tolerance=tolerance)) / exact - 1).abs().max()
        assert off < 3 * tolerance


def test_an_image_is_measured_as_if_it_were_alone(network: Callable[..., th.Tensor]) -> None:
    """Each chooses its own steps: in a batch, next to one that needs many, its bits and its calls are the same."""
    process, x = make_process(1000, mean="START_X"), pixels()
    x[2] *= 50  # off the range: needs other steps
    measure = partial(calc_flow_bpd, process, network, clip_denoised=False)
    together = measure(x_start=x, generator=generators(5))
    assert len(set(together["evaluations"].tolist())) > 1
    for index in range(5):
        alone = measure(x_start=x[index : index + 1], generator=generators(5)[index : index + 1])
        for name in together:
            th.testing.assert_close(alone[name], together[name][index : index + 1], rtol=1e-9, atol=1e-9)


def test_a_flow_that_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    process = make_process(1000, "20", mean="START_X")
    x = pixels()
    for options in (PRECISE, HEUN):
        with pytest.raises(ValueError, match="numbers that are not finite"):
            calc_flow_bpd(process, lambda x, t: x * math.nan, x, False, options=options)

    def rough(x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return th.sin(1e6 * x)

    monkeypatch.setattr("guided_diffusion.evaluation.flow_likelihood.MAX_STEPS", 20)
    with pytest.raises(ValueError, match="not at its end after 20 steps: give --flow_solver heun or a larger"):
        calc_flow_bpd(process, rough, x, False)


NAMES = ["cat", "dog", "owl"]
TERMS = ("vb", "mse", "xstart_mse")
PROCESS = DiffusionConfig(diffusion_steps=40, noise_schedule="cosine", learn_sigma=True)
UNET = UNetConfig(
    image_size=8,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    num_heads=2,
    num_classes=3,
    class_cond=True,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    network: Any = build_unet(UNET, True)
    generator = th.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.05 * th.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    flags = {**defaults(*cli.COMMANDS["image_train"].sections), **UNET.__dict__, **PROCESS.__dict__}
    checkpoints.save(str(folder / "ema_0.5_000100.pt"), network.state_dict())
    write_json(str(folder / "config.json"), {"command": "image_train", "version": "0", "flags": flags})
    table = {"classes": NAMES, "class_from": "filename", "counts": [1, 1, 1]}
    write_json(str(folder / "classes.json"), table)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(37):
        side = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        side.save(folder / f"{NAMES[index % 3]}_{index:02d}.png")
    return folder


def words(run: Path, folder: Path, *more: str) -> list[str]:
    base = ["--model_path", str(run), "--data_dir", str(folder), "--timestep_respacing", "4", "--batch_size", "5"]
    return [*base, "--device", "cpu", *more]


FLOW = ("--likelihood", "flow", "--flow_solver", "heun")
VLB_FIRST = [pytest.param((), id="vlb"), pytest.param(FLOW, id="flow", marks=pytest.mark.slow)]


def contents(out: Path) -> dict[str, bytes]:
    """What a run leaves, but for its logs."""
    paths = [path for path in out.iterdir() if path.suffix in (".npz", ".csv", ".json") and path.stem != "progress"]
    return {path.name: path.read_bytes() for path in paths}


def arrays(path: Path) -> list[np.ndarray]:
    with np.load(path) as saved:
        return [saved[name] for name in sorted(saved.files)]


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "images.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def surveyed(run: Path, folder: Path, out: Path, *more: str) -> Survey:
    """What the command makes of its flags, in a folder."""
    return replace(image_nll.survey_of(restore(cli.parse("image_nll", words(run, folder, *more)))), out_dir=str(out))


@pytest.mark.parametrize("kind", VLB_FIRST)
def test_ranks_and_batches_change_nothing_and_count_each_image_once(
    run: Path, folder: Path, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    found, means = [], []
    for world_size, batch in ((1, "5"), (2, "5"), (3, "5"), (1, "37"), (2, "3")):
        survey = surveyed(run, folder, tmp_path / f"{world_size} {batch}", "--batch_size", batch, *kind)
        for rank in range(world_size):
            measure_batches(survey, rank=rank, world_size=world_size)
        merge(survey)
        out = Path(survey.out_dir)
        rows = table(out)
        assert [row["image"] for row in rows] == sorted(path.name for path in folder.iterdir())
        total = arrays(out / "bpd.npz")[0]
        assert total.tolist() == [float(row["total_bpd"]) for row in rows]
        found.append({name: value for name, value in contents(out).items() if batch == "5"})
        means.append(float(total.mean()))
    assert found[0] == found[1] == found[2]
    assert means == pytest.approx([means[0]] * 5, rel=1e-4)  # convolutions round by the shape of a batch


@pytest.mark.slow
def test_three_processes_measure_what_one_does(run: Path, folder: Path, tmp_path: Path, ranks: Nursery) -> None:
    argv = words(run, folder)
    image_nll.main([*argv, "--log_dir", str(tmp_path / "one")])
    script = Path(__file__).parents[2] / "scripts" / "image_nll.py"
    done = ranks.run([script, *argv, "--log_dir", tmp_path / "three"], ranks=3)
    assert done.returncode == 0, done.stderr
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert one == three
    assert set(one) == {"bpd.npz", "bpd.json", "images.csv", "request.json", *(f"{t}_terms.npz" for t in TERMS)}
    assert "37 images: " in (tmp_path / "three" / "log.txt").read_text()


def test_the_files_say_what_the_process_does(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    image_nll.main(words(run, folder, "--log_dir", str(out), "--save_terms", "True", "--seed", "3"))
    model = restore(cli.parse("image_nll", words(run, folder)))
    paths = sorted(folder.iterdir())
    x = th.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).movedim(-1, 1) / 127.5 - 1
    labels = th.tensor([NAMES.index(path.name.split("_")[0]) for path in paths])
    sources = generators(37, 3)
    noise = [th.stack([th.randn(x.shape[1:], generator=source) for source in sources]) for _ in range(4)]
    wanted = model.process.calc_bpd_loop(model.network, x, model_kwargs={"y": labels}, draw=iter(noise).__next__)
    total, prior = arrays(out / "bpd.npz")
    np.testing.assert_allclose(total, wanted["total_bpd"], rtol=1e-5)
    np.testing.assert_allclose(prior, wanted["prior_bpd"], rtol=1e-4)
    for name in TERMS:
        mean, each = arrays(out / f"{name}_terms.npz")
        np.testing.assert_allclose(each, wanted[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mean, each.mean(axis=0, dtype=np.float64), rtol=1e-12)
    summary = json.loads((out / "bpd.json").read_text())
    assert summary["images"] == 37
    assert summary["mean"]["total_bpd"] == pytest.approx(total.mean())
    assert summary["standard_error"]["total_bpd"] == pytest.approx(total.std(ddof=1) / math.sqrt(37))
    shown = f"37 images: {total.mean():.4f} +- {total.std(ddof=1) / math.sqrt(37):.4f} bits per dimension"
    assert shown in (out / "log.txt").read_text()


@pytest.mark.parametrize("kind", VLB_FIRST)
def test_a_run_that_falls_goes_on_to_the_same_bytes(
    run: Path, folder: Path, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    argv = words(run, folder, *(kind or ("--save_terms", "True")))
    whole, out = tmp_path / "whole", tmp_path / "out"
    image_nll.main([*argv, "--log_dir", str(whole)])
    again = [*argv, "--log_dir", str(out)]
    for writes in (4, 6):  # the fourth of eight batches; then the fifth is there, and the last file of all is missing
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("guided_diffusion.evaluation.likelihood.save_npz", failing_at(writes))
            with pytest.raises((ValueError, SystemExit)):
                image_nll.main(again)
        assert not (out / "bpd.npz").exists()
    image_nll.main(again)
    assert contents(out) == contents(whole)
    assert not (out / "shards").exists()
    assert "8 of 8 batches are there" in (out / "log.txt").read_text()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".npz"}
    image_nll.main(again)  # finished: nothing is measured again
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".npz"}
    assert (out / "log.txt").read_text().count("37 images: ") >= 1


def failing_at(number: int) -> Callable[..., None]:
    """`save_npz` on a disk that is full from the n-th file on."""
    calls = 0

    def save(path: str, *values: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise ValueError(f"{path} cannot be written (no space)")
        save_npz(path, *values)

    return save


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command refuses, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        image_nll.main(argv)
    assert ended.value.code == 2
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--probes", "2"), "--probes has no effect without --likelihood flow"),
        (("--likelihood", "flwo"), "'flwo' is none of vlb, flow; did you mean flow?"),
        ((*FLOW, "--timestep_respacing", "1"), "one step has no flow between its ends"),
        (("--data_dir", ""), "data_dir"),
    ],
)
def test_mistakes_get_one_sentence(
    run: Path, folder: Path, tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(words(run, folder, *more, "--log_dir", str(tmp_path / "out")), capsys)
    assert not list(tmp_path.glob("out/*.npz"))


def test_another_folders_likelihoods_stay(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(run, folder, "--num_samples", "6", "--log_dir", str(tmp_path))
    image_nll.main(argv)
    before = contents(tmp_path)
    for more in (("--seed", "1"), ("--num_samples", "7"), FLOW, ("--precision", "bf16"), ("--spread", "True")):
        assert "holds the likelihoods of another request (" in refused([*argv, *more], capsys)
    (tmp_path / "request.json").unlink()
    assert "exists and no request.json says what it is" in refused(argv, capsys)
    del before["request.json"]
    assert contents(tmp_path) == before


def test_an_image_that_cannot_be_read_is_named_and_the_rest_is_kept(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "data"
    broken.mkdir()
    for picture in sorted(folder.iterdir())[:12]:
        shutil.copy(picture, broken)
    path = sorted(broken.iterdir())[7]
    good = path.read_bytes()
    path.write_bytes(good[:60])
    argv = words(run, broken, "--log_dir", str(tmp_path / "out"))
    assert path.name in refused(argv, capsys)
    assert not (tmp_path / "out" / "bpd.npz").exists()
    path.write_bytes(good)
    image_nll.main(argv)
    image_nll.main(words(run, broken, "--log_dir", str(tmp_path / "whole")))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_some_of_the_images(run: Path, folder: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    for more, wanted in ((("False",), names[:4]), (("True",), [names[index] for index in (0, 9, 18, 27)])):
        out = tmp_path / more[0]
        image_nll.main(words(run, folder, "--num_samples", "4", "--spread", *more, "--log_dir", str(out)))
        assert [row["image"] for row in table(out)] == wanted
    first = {row["image"]: float(row["total_bpd"]) for row in table(tmp_path / "False")}
    spread = {row["image"]: float(row["total_bpd"]) for row in table(tmp_path / "True")}
    assert spread[names[0]] == pytest.approx(first[names[0]], rel=1e-5)  # its noise is its own, wherever it stands


@pytest.mark.parametrize("kind", VLB_FIRST)
def test_half_precision(run: Path, folder: Path, tmp_path: Path, kind: tuple[str, ...]) -> None:
    """The network's alone: sums and logarithms stay in fp32."""
    found = []
    for name in ("fp32", "fp16", "bf16"):
        out = tmp_path / name
        more = ("--num_samples", "5", "--clip_denoised", "False", "--precision", name, "--log_dir", str(out))
        image_nll.main(words(run, folder, *kind, *more))
        found.append(arrays(out / "bpd.npz")[0])
    assert not np.array_equal(found[0], found[1])
    np.testing.assert_allclose(found[1], found[0], rtol=0.02)
    np.testing.assert_allclose(found[2], found[0], rtol=0.1)


def test_a_likelihood_that_is_no_number_ends_the_measuring(run: Path, folder: Path, tmp_path: Path) -> None:
    survey = surveyed(run, folder, tmp_path)
    seen: list[int] = []

    def bits(images: th.Tensor, *_: object) -> dict[str, th.Tensor]:
        seen.append(len(images))
        values = th.tensor([0.0, *[math.nan if len(seen) == 2 else 0.0] * (len(images) - 1)])
        return dict.fromkeys(survey.measure.columns, values) | {name: th.zeros(len(images), 4) for name in TERMS}

    broken = replace(survey, measure=replace(survey.measure, bits=bits))
    count = survey.batch_size
    first = survey.names[count + 1]
    message = f"{count - 1} of the {count} images of batch 1 have no finite likelihood, the first is '{first}'"
    with pytest.raises(ValueError, match=message):
        carry_out(broken)
    assert not (tmp_path / "bpd.npz").exists()
    carry_out(broken)
    assert len(seen) == survey.batches + 1  # the batch before is measured once


def test_the_originals_command_line_and_files(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs names no folder but by the environment, and reads the mean terms as arr_0."""
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
    flags = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 4 "
    flags += "--num_heads 2 --class_cond True --num_classes 3 --learn_sigma True --diffusion_steps 40 "
    flags += "--noise_schedule cosine --batch_size 4 --num_samples 8 --clip_denoised True --timestep_respacing 4"
    image_nll.main([*flags.split(), "--model_path", str(run / "ema_0.5_000100.pt"), "--data_dir", str(folder)])
    for name in TERMS:
        assert arrays(tmp_path / f"{name}_terms.npz")[0].shape == (4,)
    assert [value.shape for value in arrays(tmp_path / "bpd.npz")] == [(8,), (8,)]


@pytest.mark.slow
def test_the_pages_snippet_runs() -> None:
    names = run_snippet("\n".join(snippets("docs/likelihood.md")))
    assert names["bound"].shape == names["flow"].shape == (2,)
    assert th.isfinite(names["flow"]).all()
