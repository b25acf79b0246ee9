"""What users name: local paths with whatever is in their names, file:// URLs, buckets, and what is refused."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import urllib3
from PIL import Image

from conversion.command import DATASETS
from guided_diffusion import config, dist_util, logger
from guided_diffusion.commands import flags as cli
from guided_diffusion.commands.conditioning import kind_of
from guided_diffusion.commands.npz_files import from_images
from guided_diffusion.commands.tool_sections import FromImagesConfig, NpzToolConfig
from guided_diffusion.data.conditioning import Pairing, open_cond_images
from guided_diffusion.data.init_images import InitImages
from guided_diffusion.data.labels import read_labels
from guided_diffusion.data.sources import Selection, find_images
from guided_diffusion.data.upsampling import read_base
from guided_diffusion.evaluation.images import open_images
from guided_diffusion.evaluation.weights import find_inception
from guided_diffusion.image_datasets import load_data, save_classes
from guided_diffusion.runtime import files, remote
from guided_diffusion.runtime.files import load_classes
from guided_diffusion.runtime.npz import Npz, save_npz
from guided_diffusion.runtime.pictures import to_uint8
from guided_diffusion.training import checkpoints

RESOLVED = {
    "": "",
    "auto": "auto",
    "run:1": "run:1",
    "a b:c/d e:f": "a b:c/d e:f",
    "ab:/c": "ab:/c",
    "file:///data": "/data",
    "file:///data/x%20y": "/data/x y",
    "file://localhost/data": "/data",
    "FILE:///data": "/data",
    "file:/data": "/data",  # as pathlib writes it
    "~/data": str(Path("~/data").expanduser()),
    "gs://bucket/run": "gs://bucket/run",
    "gs:/bucket/run": "gs://bucket/run",
    "s3://bucket/run": "s3://bucket/run",
    "s3:/bucket/run": "s3://bucket/run",
    "az://account/container/x": "az://account/container/x",
    "https://account.blob.core.windows.net/container/x": "https://account.blob.core.windows.net/container/x",
}
REFUSED = {
    **dict.fromkeys(
        ["https://host/a.zip", "http://host/a.zip", "hf://datasets/x", "ftp://host/x"],
        "fetch others first (curl -LO URL, hf download",
    ),
    "webdav://host/x": "give a local path",
    "file://data/x": "file:///PATH with three slashes",
    "C:\\data\\cats": "/mnt/c/data/cats",
    "d:/data": "/mnt/d/data",
    "\\\\server\\share": "path of Windows",
}


@pytest.mark.parametrize("path", RESOLVED)
def test_what_a_path_means(path: str) -> None:
    assert files.resolve(path) == RESOLVED[path]
    assert files.resolve(files.resolve(path)) == RESOLVED[path]
    assert files.is_remote(RESOLVED[path]) == RESOLVED[path].startswith(("gs", "s3", "az", "https"))


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=re.escape(REFUSED[path])) as caught:
        files.resolve(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["C:\\data", "s3:/bucket", "~", "https:/x"])
def test_what_is_there_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert files.resolve(name) == name
    assert files.isdir(name)


COMMANDS = cli.COMMANDS | cli.OTHERS | DATASETS
WORDS = ("folder", "zip", "npz", "checkpoint", "an image to", "file of", "file that", "png file")
NO_PATHS = (
    "text_fingerprint",
    "mirror",
    "features",
    "class_from",
    "label_column",
    "classes",
    "init_classes",
    "image_size",
    "checkpoint_resolutions",
)


def path_flags() -> list[tuple[str, str]]:
    return [
        (command, name)
        for command, description in COMMANDS.items()
        for name, spec in description.flags().items()
        if spec.metadata["convert"] in (config.resolved_path, config.local_path)
    ]


def command_line(command: str, flag: str, value: str) -> list[str]:
    """Words that give one flag, and what the command cannot do without."""
    flags = COMMANDS[command].flags()
    positional = {
        name: (*spec.metadata["choices"], "x")[0] for name, spec in flags.items() if spec.metadata["positional"]
    }
    named = [] if flag in positional else [f"--{flag}", value]
    return [*(value if name == flag else word for name, word in positional.items()), *named]


def test_every_flag_of_a_path_is_one() -> None:
    """A new flag whose help text speaks of files cannot be left out of what follows."""
    assert len(path_flags()) > 80
    for command, description in COMMANDS.items():
        for name, spec in description.flags().items():
            text = str(spec.metadata["help"]).lower()
            told = spec.default in ("", ()) and any(word in text for word in WORDS) and name not in NO_PATHS
            assert not told or (command, name) in path_flags(), (command, name)


@pytest.mark.parametrize(("command", "flag"), path_flags())
def test_every_command_takes_or_refuses_paths_in_one_way(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = ["hf://bucket/x", "C:\\x"]
    taken = ["data:1", "file:///data"]
    bucket = refused if COMMANDS[command].flags()[flag].metadata["convert"] is config.local_path else taken
    bucket += ["gs://bucket/x", "s3://bucket/x"]
    parser = cli.parser(command)
    for value in taken:
        given = vars(parser.parse_args(command_line(command, flag, value)))[flag]  # whatever else it needs
        assert (given[0] if isinstance(given, list) else given) == RESOLVED.get(value, value)
    for value in refused:
        with pytest.raises(SystemExit) as end:
            parser.parse_args(command_line(command, flag, value))
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert flag in said.lower()


PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


@pytest.fixture(params=["colons", "file://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A folder by a function from names in it to what a user writes: with colons in the names, or as URLs."""
    folder = tmp_path / "a:b" / "s3:x"
    folder.mkdir(parents=True)
    return lambda name: f"file://{folder}/{name}" if request.param == "file://" else f"{folder}/{name}"


def write_images(folder: Path) -> None:
    (folder / "images:1").mkdir()
    for index, name in enumerate(("cat_1.png", "dog_2.png")):
        Image.fromarray(PIXELS[index]).save(folder / "images:1" / name)
        Image.fromarray(PIXELS[index, ..., 0] % 2).save(folder / f"mask:{name}")
    with zipfile.ZipFile(folder / "all:1.zip", "w") as archive:
        for name in ("cat_1.png", "dog_2.png"):
            archive.write(folder / "images:1" / name, name)


def test_all_of_this_opens(place: Any) -> None:
    folder = Path(files.resolve(place("")))
    write_images(folder)
    options: dict[str, Any] = {"batch_size": 2, "image_size": 4, "deterministic": True, "random_flip": False}
    for name in ("images:1", "all:1.zip"):
        images, cond = next(load_data(data_dir=place(name), class_cond=True, log=lambda _: None, **options))
        np.testing.assert_array_equal(to_uint8(images + 1e-3), PIXELS)
        assert cond["y"].tolist() == [0, 1]
        assert len(open_images(place(name)).scanned.sizes) == 1
        assert InitImages(place(name), 4, 3, masks=place("mask:cat_1.png")).check(2)
        kind = kind_of(cli.Flags("image_train", {"cond_type": "image"}))
        assert kind is not None
        assert len(open_cond_images(place(name), kind, 4, Selection(2)).source) == 2
        assert len(Pairing(place(name), kind).match(find_images(place("images:1")), lambda _: None)[1].paths) == 2
    save_npz(str(folder / "two:1.npz"), PIXELS)
    assert len(read_base(place("two:1.npz"), (4, 4, 3), Selection(9))) == 2
    with Npz(place("two:1.npz")) as archive:
        assert archive.names() == ["arr_0"]
    labels = read_labels(find_images(place("images:1")))
    save_classes(place("classes:1.json"), labels)
    assert load_classes(place("classes:1.json")) == ["cat", "dog"]
    config = NpzToolConfig(source=place("images:1"), out=str(folder / "new:1.npz"))
    assert from_images(config, FromImagesConfig())[-1].endswith("2 images 4x4x3")


def test_checkpoints_and_logs_open(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logger.configure(dir=place("run:1"))
    folder = Path(files.resolve(place("run:1")))
    assert (folder / "log.txt").exists()
    checkpoints.save(str(folder / "model000001.pt"), {"a": th.ones(1)})
    (folder / "config.json").write_text(json.dumps({"flags": {"seed": 3}}))
    for name in ("run:1", "run:1/model000001.pt"):
        assert checkpoints.open_checkpoint(place(name)).path == str(folder / "model000001.pt")
        assert checkpoints.find_set(place(name)).step == 1
        assert checkpoints.config_beside(place(name)) == {"seed": 3}
    assert checkpoints.load(place("run:1/model000001.pt"))["a"] == 1
    assert dist_util.load_state_dict(place("run:1/model000001.pt"))["a"] == 1
    monkeypatch.setenv("GUIDED_DIFFUSION_INCEPTION", place("run:1/model000001.pt"))
    assert find_inception() == str(folder / "model000001.pt")


@pytest.mark.parametrize(
    "open_it",
    [
        find_images,
        checkpoints.load,
        checkpoints.open_checkpoint,
        dist_util.load_state_dict,
        load_classes,
        open_images,
        Npz,
        lambda path: InitImages(path, 4, 3),
        lambda path: read_base(path, (4, 4, 3), Selection(9)),
        lambda path: logger.configure(dir=path),
        lambda path: load_data(data_dir=path, batch_size=1, image_size=4),
    ],
)
def test_functions_refuse_what_flags_refuse(open_it: Any) -> None:
    for path in ("hf://bucket/x.npz", "https://host/x.npz", "C:\\x.npz"):
        with pytest.raises(ValueError, match=r"hf download|curl|/mnt/c") as caught:
            open_it(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["gs://bucket-of-nobody/x", "az://account/container/x"])
def test_a_bucket_out_of_reach_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: Any, **options: Any) -> None:
        asked.append(options["timeout"])
        raise urllib3.exceptions.ConnectTimeoutError("no answer")

    monkeypatch.setattr("urllib3.PoolManager.request", refuse)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(OSError, match=rf"{url} cannot be reached \(.*no answer.* attempts of 5 s to connect"):
        files.exists(url)
    assert 0 < len(asked) <= 2 * remote.ATTEMPTS
    assert {timeout.connect_timeout for timeout in asked} == {remote.CONNECT_TIMEOUT}
