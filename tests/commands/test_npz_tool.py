"""npz files to folders and back."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import Nursery

from guided_diffusion.commands import flags, npz_tool
from guided_diffusion.data.crops import center_crop_arr
from guided_diffusion.data.sources import read_image
from guided_diffusion.evaluation import images as images_module
from guided_diffusion.image_datasets import load_data
from guided_diffusion.runtime.npz import Npz, save_npz

SCRIPT = Path(__file__).parents[2] / "scripts" / "npz_tool.py"
NAMES = ["cat", "dog", "eel", "owl"]  # no image is an eel


def pixels(count: int = 12, shape: tuple[int, ...] = (5, 7, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


LABELS = np.array([3, 0, 1, 1, 3, 0, 0, 3, 1, 0, 3, 3])


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    save_npz(str(tmp_path / "some.npz"), pixels(), LABELS)
    (tmp_path / "classes.json").write_text(
        json.dumps({"classes": NAMES, "class_from": "folder", "counts": [4, 3, 0, 5]})
    )
    return str(tmp_path / "some.npz")


def run(*words: object) -> None:
    npz_tool.main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return sentence


def left_over(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if "part" in name]


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 1), (5, 7, 4), (5, 7)])
@pytest.mark.parametrize("labels", [True, False])
def test_to_files_and_back_is_the_same_file(tmp_path: Path, shape: tuple[int, ...], labels: bool) -> None:
    images = pixels(shape=shape)
    if shape[-1] == 4:
        images[:, :2, :, 3] = 0  # what cannot be seen has colours too
    save_npz(str(tmp_path / "a.npz"), images, *([LABELS] if labels else []))
    run("to-png", tmp_path / "a.npz", tmp_path / "files")
    run("from-images", tmp_path / "files", tmp_path / "b.npz")
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()
    assert left_over(tmp_path) == []


def test_names_of_classes_are_read_back_by_training(labelled: str, tmp_path: Path) -> None:
    run("to-png", labelled, tmp_path / "files", "--classes", tmp_path / "classes.json")
    names = sorted(path.name for path in (tmp_path / "files").glob("*.png"))
    assert names == sorted(f"{NAMES[label]}_{index:06d}.png" for index, label in enumerate(LABELS))
    options: dict[str, Any] = {"batch_size": 12, "image_size": "5x7", "random_flip": False, "deterministic": True}
    stream = load_data(data_dir=str(tmp_path / "files"), class_cond=True, log=lambda _: None, **options)
    assert stream.classes == ["cat", "dog", "owl"]
    batch, cond = next(stream)
    order = np.argsort([NAMES[label] for label in LABELS], kind="stable")
    assert [stream.classes[label] for label in cond["y"]] == [NAMES[LABELS[index]] for index in order]
    assert np.array_equal(np.rint((batch.numpy() + 1) * 127.5).transpose(0, 2, 3, 1), pixels()[order])

    run("from-images", tmp_path / "files", tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == Path(labelled).read_bytes()
    assert json.loads((tmp_path / "again.classes.json").read_text())["classes"] == NAMES


def test_numbers_that_name_classes_sort_as_numbers(tmp_path: Path) -> None:
    labels = np.array([2, 10, 0, 100] * 3)
    save_npz(str(tmp_path / "a.npz"), pixels(), labels)
    run("to-png", tmp_path / "a.npz", tmp_path / "files")
    run("from-images", tmp_path / "files", tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as found:
        assert np.array_equal(found["arr_1"], labels)
    assert (tmp_path / "files" / "002_000000.png").exists()


def test_a_folder_of_pictures_is_cropped_as_in_training(tmp_path: Path) -> None:
    for index, (height, width) in enumerate([(20, 31), (40, 17), (64, 64)]):
        (tmp_path / "in" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(1, (height, width, 3), index)[0]).save(
            tmp_path / "in" / "ab"[index % 2] / f"{index}.png"
        )
    run("from-images", tmp_path / "in", tmp_path / "out.npz", "--image_size", "8x12")
    paths = [tmp_path / "in" / name for name in ("a/0.png", "a/2.png", "b/1.png")]
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["arr_0"], [center_crop_arr(read_image(str(path), 3), "8x12") for path in paths])
        assert found["arr_1"].tolist() == [0, 0, 1]


def test_without_a_size_images_stay_as_they_are_and_must_be_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for index in range(2):
            Image.fromarray(pixels(1, (6, 4, 3), index)[0]).save(tmp_path / f"{index}.png")
            archive.write(tmp_path / f"{index}.png", f"{index}.png")
    run("from-images", tmp_path / "in.zip", tmp_path / "out.npz")
    assert "no labels: the file name '0.png' has no class" in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == {"arr_0"}
        assert np.array_equal(found["arr_0"], [pixels(1, (6, 4, 3), index)[0] for index in range(2)])
    with zipfile.ZipFile(tmp_path / "in.zip", "a") as archive:
        Image.fromarray(pixels(1, (4, 6, 3))[0]).save(tmp_path / "wide.png")
        archive.write(tmp_path / "wide.png", "wide.png")
    told = refusal(capsys, "from-images", tmp_path / "in.zip", tmp_path / "other.npz")
    assert "'wide.png' is 4x6 and '0.png' 6x4" in told
    assert "--image_size" in told
    assert not (tmp_path / "other.npz").exists()
    assert left_over(tmp_path) == []


def test_files_that_came_or_went_are_noticed(labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("to-png", labelled, tmp_path / "files")
    (tmp_path / "files" / "0_000001.png").unlink()
    assert "names 12 files, and others than the 11" in refusal(capsys, "from-images", tmp_path / "files", "b.npz")
    (tmp_path / "files" / "names.json").write_text("[1, 2")
    assert "does not tell the order" in refusal(capsys, "from-images", tmp_path / "files", "b.npz")


def test_images_are_never_held_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "PIECE", 2 * 5 * 7 * 3)
    held: list[int] = []
    chunks = Npz.chunks

    def counted(self: Npz, name: str, rows: int) -> Any:
        for chunk in chunks(self, name, rows):
            held.append(chunk.nbytes)
            yield chunk

    monkeypatch.setattr(Npz, "chunks", counted)
    save_npz(str(tmp_path / "a.npz"), pixels(11))
    run("to-png", tmp_path / "a.npz", tmp_path / "files")
    assert max(held) == 2 * 5 * 7 * 3
    assert sum(held) == 11 * 5 * 7 * 3
    assert len(list((tmp_path / "files").glob("*.png"))) == 11


def test_nothing_is_overwritten(labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "there.npz").write_bytes(b"mine")
    for words in (
        ["to-png", labelled, tmp_path / "files"],
        ["from-images", tmp_path / "files", tmp_path / "there.npz"],
    ):
        assert "exists already" in refusal(capsys, *words)
    assert (tmp_path / "there.npz").read_bytes() == b"mine"
    assert list((tmp_path / "files").iterdir()) == []


def test_floats_and_damaged_files_leave_nothing_behind(
    labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "floats.npz", pixels() / np.float32(127.5) - 1)
    told = refusal(capsys, "to-png", tmp_path / "floats.npz", tmp_path / "files")
    assert "holds no images of uint8, but of float32" in told
    assert "* 127.5" in told
    np.savez(tmp_path / "two.npz", a=pixels(), b=pixels())
    assert "holds a, b, and it is not clear which are images" in refusal(
        capsys, "to-png", tmp_path / "two.npz", tmp_path / "files"
    )
    np.savez(tmp_path / "odd.npz", pixels(), LABELS[:5])
    assert "no label for each of 12" in refusal(capsys, "to-png", tmp_path / "odd.npz", tmp_path / "files")

    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, zipfile.ZipFile(labelled) as whole:
        archive.writestr("arr_0.npy", whole.read("arr_0.npy")[:-100])
    assert "it ends after" in refusal(capsys, "to-png", tmp_path / "short.npz", tmp_path / "files")

    (tmp_path / "in").mkdir()
    Image.fromarray(pixels(1)[0]).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:60])
    assert "'b.png'" in refusal(capsys, "from-images", tmp_path / "in", tmp_path / "o.npz").replace(
        f"{tmp_path}/in/", ""
    )
    assert not (tmp_path / "files").exists()
    assert not (tmp_path / "o.npz").exists()
    assert left_over(tmp_path) == []


def test_classes_that_cannot_name_files_are_refused(
    labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "classes.json", tmp_path / "files"
    for names, told in (
        (["a", "b_c", "d", "e"], "'b_c'"),
        (["a", "../b", "d", "e"], "'../b'"),
        (["a", "b"], "label 3"),
    ):
        table.write_text(json.dumps({"classes": names}))
        assert told in refusal(capsys, "to-png", labelled, out, "--classes", table)
    save_npz(str(tmp_path / "bare.npz"), pixels())
    assert "has no labels" in refusal(capsys, "to-png", tmp_path / "bare.npz", out, "--classes", table)


def test_a_wrong_word_is_answered_with_a_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean to-png?" in refusal(capsys, "to-pgn", "a.npz", "b")
    assert "did you mean --image_size?" in refusal(capsys, "from-images", "a", "b.npz", "--imgae_size", 3)
    assert "has no effect without the tool from-images" in refusal(capsys, "to-png", "a", "b", "--image_size", 3)
    with pytest.raises(SystemExit):
        npz_tool.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word.upper() in shown or f"--{word} " in shown for word in flags.COMMANDS["npz_tool"].flags())


def test_as_a_script(labelled: str, tmp_path: Path, ranks: Nursery) -> None:
    def script(*words: str) -> subprocess.CompletedProcess[str]:
        return ranks.run([SCRIPT, *words], ranks=1, cwd=tmp_path)

    done = script("to-png", labelled, "files")
    assert (done.returncode, done.stdout) == (0, "files: 12 images of 4 classes\n")
    done = script("to-png", "nothing.npz", "other")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
