"""Vectors and multi-hot conditions: from tables to a network, dropped, guided, and sampled for."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image
from test_train_commands import TINY, command_line, refused

from guided_diffusion.commands import image_nll, image_sample, image_train
from guided_diffusion.data.sources import find_images
from guided_diffusion.data.tables import read_vectors
from guided_diffusion.networks.architecture import architecture
from guided_diffusion.networks.backbone import UNetModel
from guided_diffusion.sampling.guidance import classifier_free
from guided_diffusion.training import checkpoints
from guided_diffusion.training.noise import LabelDropout

NUMBERS = [[i % 2, 0.25 * i] for i in range(4)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * index, np.uint8)).save(folder / f"{index}.png")
    with open(folder / "metadata.csv", "w") as file:
        csv.writer(file).writerows(
            [["file_name", "hat", "age", "text"], *([f"{i}.png", *NUMBERS[i], "x"] for i in range(4))]
        )
    return folder


def network(**options: object) -> UNetModel:
    th.manual_seed(0)
    model = UNetModel(8, 3, 32, 3, 1, (), channel_mult=(1,), vector_dim=2, use_scale_shift_norm=True, **options)
    for parameter in model.parameters():
        parameter.data = 0.05 * th.randn(parameter.shape) + (parameter.ndim == 1)
    return model.eval()


def json_lines(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_tables_give_numbers_in_the_order_of_the_columns(pictures: Path) -> None:
    vectors = read_vectors(find_images(str(pictures)), "age, hat")
    np.testing.assert_array_equal(vectors, np.array(NUMBERS, np.float32)[:, ::-1])
    json_lines(pictures, [{"file_name": f"{i}.png", "tags": [i, 1], "size": None if i else 5} for i in range(4)])
    vectors = read_vectors(find_images(str(pictures)), "tags,size")
    np.testing.assert_array_equal(vectors, [[0, 1, 5], *([i, 1, np.nan] for i in (1, 2, 3))])


@pytest.mark.parametrize(
    ("columns", "rows", "sentence"),
    [
        ("hats", None, "has no column 'hats'; did you mean hat?"),
        ("text", None, "are not all numbers"),
        ("n", [{"file_name": "0.png", "n": 1}], "no row for 3 of 4 images"),
        ("n", [{"file_name": f"{i}.png", "n": [1] * (1 + i // 3)} for i in range(4)], "have from 1 to 2 numbers"),
        ("n", [{"file_name": f"{i // 2}.png", "n": i} for i in range(4)], "'0.png' has two vectors"),
        ("n", [{"file_name": f"{i}.png", "n": "inf"} for i in range(4)], "not all finite"),
    ],
)
def test_tables_that_give_no_vectors_are_refused(pictures: Path, columns: str, rows: object, sentence: str) -> None:
    if rows:
        json_lines(pictures, rows)
    with pytest.raises(ValueError, match="gives no vectors") as caught:
        read_vectors(find_images(str(pictures)), columns)
    assert sentence in str(caught.value)
    (pictures / "metadata.csv").unlink(missing_ok=True)
    (pictures / "metadata.jsonl").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"needs a table in .*: write one of dataset.json"):
        read_vectors(find_images(str(pictures)), columns)


def test_an_image_loses_its_vector_with_its_label() -> None:
    cond = {"y": th.arange(64), "vector": th.ones(64, 2), "low_res": th.ones(64)}
    out = LabelDropout(0.5, 99, null_vector=True)(cond, 0, 3)
    dropped = out["y"] == 99
    assert 10 < int(dropped.sum()) < 54
    assert th.equal(out["vector"].isnan(), dropped[:, None].expand(64, 2))
    assert out["low_res"] is cond["low_res"]
    alone = LabelDropout(0.5, None, null_vector=True)({"vector": cond["vector"]}, 0, 3)
    assert th.equal(alone["vector"].isnan(), out["vector"].isnan())  # the key is the step's
    with pytest.raises(ValueError, match="under 'vector'"):
        LabelDropout(0.5, None, null_vector=True)({}, 0, 0)


def test_guidance_leads_away_from_the_network_without_its_vector() -> None:
    model, x, t = network(null_class=True), th.randn(2, 3, 8, 8), th.tensor([3.0, 7.0])
    vector = th.tensor([[1.0, 0.5], [float("nan"), 2.0]])
    with th.no_grad():
        with_it, without = model(x, t, vector=vector), model(x, t, vector=th.full_like(vector, float("nan")))
        guided = classifier_free(model, 3.0)(x, t, vector=vector)
        assert not th.allclose(with_it, without)
        th.testing.assert_close(guided, without + 3 * (with_it - without), rtol=1e-4, atol=1e-5)
        one = model(x, t, vector=vector.nan_to_num(0.0))  # an unknown number is not a number 0
        assert not th.allclose(one[1], with_it[1])
        th.testing.assert_close(one[0], with_it[0])
    assert architecture(model.state_dict())["vector_dim"] == 2
    with pytest.raises(ValueError, match="without labels too"):
        classifier_free(network(), 3.0)
    for wrong in (None, th.ones(2, 3)):
        with pytest.raises(ValueError, match=r"vector must be of shape \(2, 2\)"):
            model(x, t, vector=wrong)


def test_from_a_table_to_guided_samples(tmp_path: Path, pictures: Path, capsys) -> None:
    run, flags = tmp_path / "run", TINY | {"batch_size": 2, "max_steps": 2, "learn_sigma": True}
    flags |= {"data_dir": pictures, "log_dir": run, "sample_interval": 2}
    image_train.main(command_line(**flags, vector_columns="hat,age", class_dropout=0.5))
    saved = checkpoints.config_beside(str(run))
    assert (saved["vector_dim"], saved["null_class"]) == (2, True)
    assert (run / "previews" / "000002.png").exists()

    def made(name: str, **more: object) -> np.ndarray:
        common = {"model_path": run, "log_dir": tmp_path / name, "num_samples": 3, "batch_size": 3, "seed": 1}
        image_sample.main(command_line(**common, sampler="ddim", steps=2, **more))
        with np.load(next((tmp_path / name).glob("samples_*.npz"))) as file:
            return np.asarray(file["arr_0"])

    (tmp_path / "rows.csv").write_text("1,0.5\n0,nan\n")
    # weights of two steps: only that each reaches the network can be seen, by what the log folder is made for
    assert made("a", vector="1,0.5;0,nan", cfg_scale=2.0).shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(
        made("a", vector="1,0.5;0,nan", cfg_scale=2.0), made("b", vectors=tmp_path / "rows.csv", cfg_scale=2.0)
    )
    made("c")
    sampling = {"model_path": run, "log_dir": tmp_path / "d", "num_samples": 1}
    assert "needs 2 numbers, of hat,age" in refused(capsys, image_sample.main, **sampling, vector="1")
    gone = refused(capsys, image_sample.main, **sampling, vectors=tmp_path / "row.csv")
    assert "row.csv does not exist; did you mean rows.csv?: give a file with a vector on each line" in gone
    assert "--vector is no list of numbers" in refused(capsys, image_sample.main, **sampling, vector="red,1")
    image_nll.main(
        command_line(model_path=run, data_dir=pictures, log_dir=tmp_path / "nll", num_samples=2, timestep_respacing="2")
    )
