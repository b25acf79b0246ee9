"""Full disks, folders that cannot be written to, cut files, too little memory: a sentence, and nothing lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import (
    TINY,
    bound_by_permissions,
    can_mount,
    command,
    contents,
    finish,
    on_small_disk,
    sampling_differences,
    the_sentence,
    training_differences,
    unfinished,
)
from ranks import Nursery

from guided_diffusion.commands import image_sample, image_train
from guided_diffusion.training import checkpoints as checkpoint

FLAGS: dict[str, Any] = {**TINY, "batch_size": 4, "save_interval": 2, "ema_rate": "0.5"}
SAMPLES: dict[str, Any] = {"num_samples": 61, "batch_size": 4, "steps": 2}
Limit = Callable[[list[str], Path, Nursery], tuple[int, str]]


def run(main: Callable[[Sequence[str]], None], **flags: Any) -> None:
    main([f"--{name}={value}" for name, value in flags.items()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, and the same gone on to step 8."""
    folder = tmp_path_factory.mktemp("runs")
    run(image_train.main, **FLAGS, log_dir=folder / "half", max_steps=4)
    shutil.copytree(folder / "half", folder / "whole")
    run(image_train.main, **FLAGS, log_dir=folder / "whole", max_steps=8, resume_checkpoint="auto")
    run(image_sample.main, **SAMPLES, model_path=folder / "whole", log_dir=folder / "samples")
    return folder


@pytest.fixture
def half(runs: Path, tmp_path: Path) -> Path:
    """A copy of the run of 4 steps."""
    return Path(shutil.copytree(runs / "half", tmp_path / "run"))


def checkpoints(folder: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if any(map(str.isdigit, path.stem))}


def file_limit(argv: list[str], folder: Path, ranks: Nursery, size: int = 1_000_000) -> tuple[int, str]:
    """Weights of 720 kB fit, the optimizer's 1450 kB do not."""
    return forked(LITTLE_FILES, [str(size), *argv[1:]], folder, ranks)


def forked(program: str, argv: list[str], folder: Path, ranks: Nursery) -> tuple[int, str]:
    """What a program of its own returns and prints."""
    script = folder.with_suffix(".py")
    script.write_text(program)
    done = ranks.run([script, *argv], ranks=1)
    return done.returncode, done.stdout + done.stderr


def small_disk(argv: list[str], folder: Path, _: Nursery) -> tuple[int, str]:
    """One more checkpoint of 3 MB fits in part."""
    there = sum(path.stat().st_size for path in folder.rglob("*"))
    return finish(on_small_disk(argv, folder, str(there + 2_500_000)), folder.with_suffix(".txt"))


def read_only_disk(argv: list[str], folder: Path, _: Nursery) -> tuple[int, str]:
    return finish(on_small_disk(argv, folder, "64m", options="ro"), folder.with_suffix(".txt"))


def read_only_folder(argv: list[str], folder: Path, _: Nursery) -> tuple[int, str]:
    folder.chmod(0o555)
    try:
        return finish(argv, folder.with_suffix(".txt"), bound_by_permissions)
    finally:
        folder.chmod(0o755)


LITTLE_FILES = """
import resource, runpy, sys
del sys.argv[0]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(0)),) * 2)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LITTLE_MEMORY = """
import resource, sys
from guided_diffusion import train_util
from guided_diffusion.commands import image_train
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200_000_000,) * 2)
image_train.main(sys.argv[1:])
"""  # enough for everything but a step of 2048 images
DISKS: dict[str, tuple[Limit, str]] = {
    "file size": (file_limit, "File too large"),
    "permissions": (read_only_folder, "Permission denied"),
}
MOUNTED: dict[str, tuple[Limit, str]] = {
    "small disk": (small_disk, "No space left on device"),
    "read-only disk": (read_only_disk, "Read-only file system"),
}


@pytest.mark.parametrize("name", ["file size", pytest.param("permissions", marks=pytest.mark.slow)])
def test_training_ends_with_a_sentence_and_goes_on_later(runs: Path, half: Path, ranks: Nursery, name: str) -> None:
    refuse_to_write(runs, half, ranks, *DISKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MOUNTED if can_mount() else [])  # the cases above stand for them elsewhere
def test_training_on_a_disk_that_is_full_or_read_only(runs: Path, half: Path, ranks: Nursery, name: str) -> None:
    refuse_to_write(runs, half, ranks, *MOUNTED[name])


def refuse_to_write(runs: Path, half: Path, ranks: Nursery, limit: Limit, reason: str) -> None:
    """Let a resumed run fail by a limit, and then go on without it."""
    before = checkpoints(half)
    argv = command("image_train", **FLAGS, log_dir=half, max_steps=8, resume_checkpoint="auto")
    code, text = limit(argv, half, ranks)
    assert code == 2, text
    sentence = the_sentence(text)
    assert reason in sentence
    assert str(half) in sentence
    after = checkpoints(half)
    assert {name: after.get(name) for name in before} == before
    assert not unfinished(half)
    run(image_train.main, **FLAGS, log_dir=half, max_steps=8, resume_checkpoint="auto")
    assert training_differences(runs / "whole", half, 8) == []


def test_sampling_ends_with_a_sentence_and_goes_on_later(runs: Path, tmp_path: Path, ranks: Nursery) -> None:
    """All shards of 1 kB are written, their npz of 12 kB cannot be."""
    flags = {**SAMPLES, "model_path": runs / "whole", "log_dir": tmp_path / "samples"}
    code, text = file_limit(command("image_sample", **flags), tmp_path / "first", ranks, 9_000)
    assert code == 2, text
    assert "samples_61x8x8x3.npz cannot be written (File too large)" in the_sentence(text)
    there = contents(tmp_path / "samples")
    assert len(there) == 17  # 16 shards and the request
    run(image_sample.main, **flags)
    assert sampling_differences(runs / "samples", tmp_path / "samples") == []


def test_out_of_memory(runs: Path, half: Path, ranks: Nursery) -> None:
    before = checkpoints(half)
    flags = {**FLAGS, "log_dir": half, "max_steps": 8, "resume_checkpoint": "auto", "batch_size": 2048}
    code, text = forked(LITTLE_MEMORY, [f"--{name}={value}" for name, value in flags.items()], half, ranks)
    assert code != 0
    assert "memory" in the_sentence(text)
    assert checkpoints(half) == before
    run(image_train.main, **FLAGS, log_dir=half, max_steps=8, resume_checkpoint="auto")
    assert training_differences(runs / "whole", half, 8) == []


@pytest.mark.parametrize("place", ["a file/run", "/proc/run"])
def test_folders_that_cannot_be(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    more: list[tuple[Any, dict[str, Any]]] = [
        (image_train.main, {**FLAGS, "max_steps": 1}),
        (image_sample.main, {**SAMPLES, "model_path": runs / "half"}),
    ]
    for main, flags in more:
        with pytest.raises(SystemExit) as caught:
            run(main, **flags, log_dir=place)
        assert caught.value.code == 2
        assert place in the_sentence(capsys.readouterr().err)


def kinds(folder: Path) -> list[str]:
    """The files of the newest checkpoint."""
    return sorted(path.name for path in folder.iterdir() if "000004" in path.name)


def test_a_checkpoint_cut_anywhere_is_never_taken_for_whole(runs: Path, half: Path) -> None:
    names = kinds(half)
    assert len(names) == 5  # model, average, optimizer, state, manifest
    for name in names:
        content = (half / name).read_bytes()
        for tenth in range(10):
            (half / name).write_bytes(content[: len(content) * tenth // 10])
            found = checkpoint.newest(str(half))[0]
            assert found is not None
            assert found.step == 2, f"{name} cut to {tenth} tenths was taken"
        (half / name).write_bytes(content)
    os.remove(half / names[0])
    assert checkpoint.newest(str(half))[0].step == 2  # type: ignore[union-attr]


def test_a_run_goes_on_from_the_checkpoint_before_a_cut_one(
    runs: Path, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = half / "model000004.pt"
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    run(image_train.main, **FLAGS, log_dir=half, max_steps=8, resume_checkpoint="auto")
    printed = capsys.readouterr().out
    assert "resuming at step 2: weights from" in printed
    assert "model000004.pt has" in printed
    assert training_differences(runs / "whole", half, 8) == []


@pytest.mark.parametrize("tenth", [0, 1, 5, 9])
def test_weights_cut_anywhere_are_not_sampled_from(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tenth: int
) -> None:
    content = (runs / "whole" / "ema_0.5_000008.pt").read_bytes()
    (tmp_path / "ema_0.5_000008.pt").write_bytes(content[: len(content) * tenth // 10])
    shutil.copy(runs / "whole" / "config.json", tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(image_sample.main, **SAMPLES, model_path=tmp_path, log_dir=tmp_path / "samples")
    assert caught.value.code == 2
    assert str(tmp_path / "ema_0.5_000008.pt") in the_sentence(capsys.readouterr().err)
    assert not list(tmp_path.glob("samples/*.npz"))
