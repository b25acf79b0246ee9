"""Random and randomly damaged input: it is taken, or refused by a sentence of this package's own, and nothing else.

The same inputs in every run; `make test-slow` tries fifty times as many, and others each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from runs import load_weights

from guided_diffusion import dist_util
from guided_diffusion.commands import flags as cli
from guided_diffusion.commands.conditioning import read_base
from guided_diffusion.config import ClassifierConfig, DiffusionConfig, SuperResConfig, UNetConfig
from guided_diffusion.data.labels import read_labels
from guided_diffusion.data.sources import find_images, read_image
from guided_diffusion.image_datasets import load_data
from guided_diffusion.networks.architecture import architecture
from guided_diffusion.runtime.jobs import RestartableJob
from guided_diffusion.runtime.labels import parse_classes
from guided_diffusion.runtime.npz import read_npz, save_npz
from guided_diffusion.script_util import build_classifier, build_diffusion, build_unet, build_upsampler
from guided_diffusion.training import checkpoints

EXAMPLES, MORE = 35, 3000
WORDS = st.sampled_from(
    ["labels", "classes", "class_from", "counts", "flags", "num_channels", "seed", "a_1.png", "b_1.png"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**400), 2**63, 2**31, -1, 0]),
    st.floats(),
    st.text(max_size=20),
    WORDS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def survives(call: Callable[[], Any]) -> None:
    """Run it: no error, or one that a user is told in one printable line."""
    refusal = refused(call)
    if refusal is not None:
        assert dist_util.exit_of(refusal)[0] == 2, f"raised by other code: {refusal!r}"
        assert str(refusal)
        assert str(refusal).isprintable(), str(refusal)


def refused(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except (ValueError, OSError) as error:
        return error
    return None


def png(value: int = 7) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 9, 200)).save(file, "png")
    return file.getvalue()


@cache
def pictures() -> dict[str, bytes]:
    """A file of each format, with EXIF, alpha, palettes, 16 bit and several frames among them."""
    rng, found = np.random.default_rng(0), {}
    colour = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    cases: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "a.png": (colour, "png", {"exif": exif}),
        "b.png": (colour.quantize(8), "png", {"transparency": 1}),
        "c.png": (Image.fromarray(rng.integers(0, 65536, (9, 11), np.uint16)), "png", {}),
        "a.jpg": (colour, "jpeg", {"exif": exif}),
        "b.jpg": (colour, "jpeg", {"progressive": True}),
        "a.gif": (colour, "gif", {"save_all": True, "append_images": [colour.rotate(90)]}),
        "a.bmp": (colour, "bmp", {}),
        "a.tif": (colour, "tiff", {"compression": "tiff_lzw"}),
        "b.tif": (colour.convert("CMYK"), "tiff", {"compression": "jpeg"}),
        "c.tif": (Image.fromarray(rng.random((9, 11), np.float32)), "tiff", {}),
        "a.webp": (colour.convert("RGBA"), "webp", {"lossless": True}),
        "b.webp": (colour, "webp", {"save_all": True, "append_images": [colour.rotate(90)]}),
    }
    for name, (image, kind, options) in cases.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        found[name] = file.getvalue()
    file = io.BytesIO()
    np.save(file, np.asarray(colour))
    return {**found, "a.npy": file.getvalue()}


@cache
def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        for number, name in enumerate(["a_1.png", "b/c_2.png", "dataset.json"]):
            content = png(number) if number < 2 else b'{"labels": [["a_1.png", 0], ["b/c_2.png", 1]]}'
            writer.writestr(name, content, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][number % 2])
    return file.getvalue()


@cache
def saved(kind: str) -> bytes:
    """A checkpoint of some kind."""
    state = {"weight": th.arange(6.0).reshape(2, 3), "bias": th.zeros(2), "step": 3, "rest": [1, "a", (2.5,)]}
    if kind == "safetensors":
        import safetensors.torch

        return safetensors.torch.save({name: state[name] for name in ("weight", "bias")})
    file = io.BytesIO()
    th.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


@cache
def arrays() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        save_npz(str(path), np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3), np.arange(2))
        return path.read_bytes()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes overwritten, removed, put in, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, new = draw(st.integers(0, len(data))), draw(st.binary(min_size=1, max_size=8))
        how = draw(st.sampled_from(["overwrite", "insert", "remove", "cut"]))
        if how == "cut":
            del data[at:]
        elif how == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        else:
            data[at : at + (len(new) if how == "overwrite" else 0)] = new
    return bytes(data)


def any_json(inner: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[bytes]:
    """JSON texts of any values, NaN and huge numbers among them, some damaged, and bytes that are none."""
    whole = inner.map(lambda value: json.dumps(value).encode())
    odd = st.sampled_from(
        [b"[" * 50_000, b'{"labels":' * 20_000, b"9" * 6000, b"\xff\xfe", b'{"a":1,"a":2}', b"\xef\xbb\xbf{}"]
    )
    return st.one_of(whole, whole.flatmap(damaged), odd, st.binary(max_size=60))


FOLDER: list[Path] = []  # of the test that runs


def put(name: str, content: bytes) -> str:
    path = FOLDER[0] / name
    path.write_bytes(content)
    return str(path)


def picture(case: tuple[str, bytes]) -> None:
    path = put(*case)
    for channels in (1, 3, 4):
        survives(lambda: read_image(path, channels))  # noqa: B023 - called at once


def stream_of_zip(content: bytes) -> None:
    path = put("a.zip", content)
    for rule in ("auto", "filename"):
        options: Any = {"class_cond": True, "class_from": rule, "image_size": 4, "log": lambda line: None}
        survives(lambda: next(load_data(data_dir=path, batch_size=1, **options)))  # noqa: B023


def label_file(case: tuple[str, bytes]) -> None:
    put("a_1.png", png())
    put(*case)
    survives(lambda: read_labels(find_images(str(FOLDER[0]))))


def class_table(content: bytes) -> None:
    put("a_1.png", png())
    path = put("classes.json", content)
    survives(lambda: read_labels(find_images(str(FOLDER[0])), "auto", path))


def run_config(content: bytes) -> None:
    path = put("config.json", content)

    def use() -> None:
        flags = cli.Flags("image_sample", {}, {}).over(checkpoints.config_beside(path), UNetConfig, DiffusionConfig)
        build_diffusion(flags.part(DiffusionConfig))

    survives(use)


class OneRow(RestartableJob):
    """A job of one number."""

    size = 1
    arrays: Any = (((), np.uint8),)


def request(content: bytes) -> None:
    put("request.json", content)
    survives(lambda: OneRow(out_dir=str(FOLDER[0]), batch_size=1).claim({"seed": 1}, []))


def weights(case: tuple[str, bytes]) -> None:
    path = put(*case)
    survives(lambda: load_weights(th.nn.Linear(3, 2), path))


def npz(content: bytes) -> None:
    path = put("a.npz", content)
    survives(lambda: read_base(cli.Flags("super_res_sample", {"base_samples": path, "small_size": 4}, {})))
    survives(lambda: list(read_npz(path, "arr_0", 1)))


def npy_header(header: bytes) -> None:
    content = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(48)
    path, file = put("a.npy", content), io.BytesIO()
    survives(lambda: read_image(path, 3))
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("arr_0.npy", content)
    npz(file.getvalue())


def class_words(text: str) -> None:
    survives(lambda: parse_classes(text, 10, ["cat", text]))


def command_line(case: tuple[str, list[str]]) -> None:
    """An answer is one line that begins with the command's name, and exit code 2."""
    name, argv = case
    said, code = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.parse(name, argv)
        except SystemExit as error:
            code = error.code
    if code is not None and not {"-h", "--help"} & set(argv):
        assert code == 2
        assert said.getvalue().startswith(f"{name}.py: error: ")


def network(case: tuple[type[Any], dict[str, Any]]) -> None:
    """A config builds a process and, on the meta device, a network."""
    section, values = case
    command = {UNetConfig: "image_sample", ClassifierConfig: "classifier_sample", SuperResConfig: "super_res_sample"}

    def build() -> None:
        flags = cli.Flags(command[section], {}, {}).over({**SMALL, **values}, section, DiffusionConfig)
        build_diffusion(flags.part(DiffusionConfig))
        with th.device("meta"):
            config = flags.part(section)
            if section is ClassifierConfig:
                build_classifier(config)
            else:
                (build_upsampler if section is SuperResConfig else build_unet)(config, False)

    survives(build)


def state_dict(shapes: dict[str, tuple[int, ...]]) -> None:
    class Shaped:
        def __init__(self, shape: tuple[int, ...]) -> None:
            self.shape = shape

    state: Any = {name: Shaped(shape) for name, shape in {**TRUNK, **shapes}.items()}
    assert isinstance(architecture(state, 64), dict)
    assert isinstance(architecture(state), dict)


def file_names(names: list[bytes]) -> None:
    """Any bytes that the system takes for a name."""
    for name in (name.replace(b"\0", b"").replace(b"/", b"") for name in names):
        with contextlib.suppress(OSError), open(bytes(FOLDER[0]) + b"/" + name + b"_1.png", "wb") as file:
            file.write(png())

    def use() -> None:
        lines: list[str] = []
        stream = load_data(
            data_dir=str(FOLDER[0]),
            batch_size=1,
            image_size=4,
            class_cond=True,
            class_from="filename",
            log=lines.append,
        )
        next(stream)
        assert all(line.isprintable() for line in "\n".join(lines).split("\n"))

    survives(use)


SMALL: dict[str, Any] = {
    "image_size": 16,
    "large_size": 16,
    "small_size": 8,
    "num_classes": 10,
    "diffusion_steps": 30,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_channel_mult": "1,2",
    "classifier_attention_resolutions": "8",
}
TRUNK = {
    "time_embed.0.weight": (32, 8),
    "input_blocks.0.0.weight": (8, 3, 3, 3),
    "middle_block.0.out_layers.0.weight": (8,),
    "middle_block.0.emb_layers.1.weight": (16, 32),
    "out.0.weight": (8,),
    "out.2.weight": (3, 8, 3, 3),
}
ODD_TEXT = st.sampled_from(
    [
        *"1 1,2 0 -1 nan 1e400 0.5,1 x 1,,2 , ddim5 ddim0 list:nan trailing0 logsnr3 karras999999999 10,0 0x0".split(),
        *["", "\ud800", "\0", "\u0663", "9" * 5000],
    ]
)
ODD_NUMBERS = st.sampled_from([-(10**30), -1, 0, 1, 2, 7, 33, 64, 1000, 10**6, 10**9, 10**18, 10**30])


def value_of(spec: Any) -> st.SearchStrategy[Any]:
    if isinstance(spec.default, bool):
        return st.booleans()
    if spec.type == "int | str":
        return st.sampled_from([8, 7, 1, 0, 10**9, "8x16", "x", "16x0"])
    usual = st.sampled_from(spec.metadata["choices"]) if spec.metadata["choices"] else ODD_TEXT
    kinds: dict[type, st.SearchStrategy[Any]] = {int: ODD_NUMBERS, float: st.floats(), str: usual}
    return kinds[type(spec.default)] | SCALARS


@st.composite
def configs(draw: st.DrawFn) -> tuple[type[Any], dict[str, Any]]:
    section = draw(st.sampled_from([UNetConfig, ClassifierConfig, SuperResConfig]))
    specs = {spec.name: spec for part in (section, DiffusionConfig) for spec in fields(part)}
    specs = {name: spec for name, spec in specs.items() if not spec.metadata["runtime"]}
    names = draw(st.lists(st.sampled_from(sorted(specs)), min_size=1, max_size=3, unique=True))
    return section, {name: draw(value_of(specs[name])) for name in names}


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    name = draw(st.sampled_from(sorted(name for name, command in cli.COMMANDS.items() if command.words())))
    known = st.sampled_from([f"--{word}" for word in cli.COMMANDS[name].words()])
    word = st.one_of(known, known, ODD_TEXT, ODD_NUMBERS.map(str), st.text(max_size=12), st.floats().map(str))
    return name, draw(st.lists(word, max_size=6))


LAYERS = st.sampled_from(["input_blocks", "output_blocks", "out", "label_emb", "middle_block", "time_embed"])
PLACES = st.sampled_from(["0", "1", "2", "-1", "x", "99999999999", "\u00b2", ""])
PARTS = st.sampled_from(["weight", "in_layers.0.weight", "out_layers.0.weight", "qkv.weight", "positional_embedding"])
HEADER_PARTS = st.sampled_from(
    [
        *"{ } ( ) , : 'descr' 'fortran_order' 'shape' '|u1' '|O' '<f4' 'V0' True False None 1 4 3 -1 10**9 L #".split(),
        *["\n", " ", "1000000000000", "[('a','|u1')]", "lambda: 0"],
    ]
)
RIGHT = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 4, 4, 3)}\n"
ROW_LISTS = st.lists(st.tuples(st.sampled_from(["a_1.png", "b_1.png"]) | SCALARS, SCALARS) | VALUES, max_size=4)
LABEL_TABLES = ROW_LISTS.map(lambda rows: {"labels": rows}) | VALUES
CSV_TEXT = st.text(alphabet='a_1.png,0\n\r"\0 \u0663-;', max_size=60).map(str.encode)
CLASS_TABLES = (
    st.fixed_dictionaries({"classes": st.lists(st.text(max_size=5) | SCALARS), "class_from": SCALARS}) | VALUES
)
FLAG_TABLES = configs().map(lambda case: {"flags": case[1]}) | VALUES

CASES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "pictures": (
        st.sampled_from(sorted(pictures())).flatmap(lambda n: st.tuples(st.just(n), damaged(pictures()[n]))),
        picture,
    ),
    "zips": (damaged(archive()), stream_of_zip),
    "dataset.json": (st.tuples(st.just("dataset.json"), any_json(LABEL_TABLES)), label_file),
    "labels.csv": (st.tuples(st.just("labels.csv"), CSV_TEXT | st.binary(max_size=60)), label_file),
    "classes.json": (any_json(CLASS_TABLES), class_table),
    "config.json": (any_json(FLAG_TABLES), run_config),
    "request.json": (any_json(), request),
    "zip checkpoints": (st.tuples(st.just("a.pt"), damaged(saved("zip"))), weights),
    "older checkpoints": (st.tuples(st.just("a.pt"), damaged(saved("legacy"))), weights),
    "safetensors": (st.tuples(st.just("a.safetensors"), damaged(saved("safetensors"))), weights),
    "npz": (damaged(arrays()), npz),
    "npy headers": (
        st.lists(HEADER_PARTS, max_size=12).map(lambda p: "".join(p).encode()) | damaged(RIGHT),
        npy_header,
    ),
    "classes": (st.text(max_size=20) | ODD_TEXT, class_words),
    "command lines": (command_lines(), command_line),
    "networks": (configs(), network),
    "state dicts": (
        st.dictionaries(
            st.tuples(LAYERS, PLACES, PLACES, PARTS).map(".".join) | st.text(max_size=20),
            st.lists(st.integers(0, 10), max_size=4).map(tuple),
            max_size=6,
        ),
        state_dict,
    ),
    "file names": (st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=3), file_names),
}


def run(name: str, *, examples: int, random: bool) -> int:
    """Try so many inputs of a case; returns how many there were."""
    strategy, check = CASES[name]
    count = 0

    def attempt(value: Any) -> None:
        nonlocal count
        count += 1
        with tempfile.TemporaryDirectory() as folder:
            FOLDER[:] = [Path(folder)]
            check(value)

    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(
        max_examples=examples, derandomize=not random, database=None, deadline=None, suppress_health_check=checks
    )
    chosen(given(strategy)(attempt))()
    return count


@pytest.mark.filterwarnings("ignore:a linear schedule of .* steps has betas above 0.999")
@pytest.mark.parametrize("name", CASES)
def test_malformed_input(name: str) -> None:
    assert run(name, examples=EXAMPLES, random=False) > EXAMPLES // 2


@pytest.mark.filterwarnings("ignore:a linear schedule of .* steps has betas above 0.999")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_much_more_malformed_input(name: str) -> None:
    run(name, examples=MORE, random=True)
