"""Tiny data sets of every format that datasets/ reads, each written by the format's own library."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "datasets"


def script(name):
    """A script as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name, *words):
    """A script with a command line, in this process."""
    script(name).main([str(word) for word in words])


def pixels(seed, height=14, width=10):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def packed(seed, kind="JPEG", **size):
    file = io.BytesIO()
    Image.fromarray(pixels(seed, **size)).save(file, kind)
    return file.getvalue()


def tar_of(files):
    """The bytes of a tar of (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def class_tar(wnid, seeds):
    return tar_of([(f"{wnid}_{seed}.JPEG", packed(seed)) for seed in seeds])


def imagenet(folder):
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(
        tar_of([("n02084071.tar", class_tar("n02084071", range(3))), ("n01440764.tar", class_tar("n01440764", [8, 9]))])
    )
    return path, [], {"n01440764": 2, "n02084071": 3}


def rows(count, side):
    return np.random.default_rng(count).integers(0, 256, (count, 3 * side * side), np.uint8)


def imagenet64(folder):
    source = folder / "batches"
    source.mkdir()
    for number, labels in ((1, [1, 1000, 3]), (2, [3, 1]), (10, [3])):
        np.savez(source / f"train_data_batch_{number}.npz", data=rows(len(labels), 8), labels=np.array(labels))
    return source, [], {"0001": 2, "0003": 3, "1000": 1}


def write_lmdb(path, images):
    with lmdb.open(str(path), map_size=2**24) as database, database.begin(write=True) as transaction:
        for key, content in images:
            transaction.put(key, content)


def lsun(folder):
    source = folder / "lsun"
    for name, seeds in (("church_outdoor_train_lmdb", range(4)), ("bedroom_train_lmdb", range(4, 7))):
        (source / name).mkdir(parents=True)
        images = [(f"{seed:040x}".encode(), packed(seed, "WEBP", height=70, width=90)) for seed in seeds]
        write_lmdb(source / name, images)
    return source, ["--size", 32], {"bedroom": 3, "church-outdoor": 4}


def cifar(folder, **pickling):
    source = folder / "cifar-10-batches-py"
    source.mkdir()
    (source / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"airplane", b"automobile"]}, 2))
    for number in range(1, 6):
        batch = {b"data": rows(2, 32), b"labels": [0, number % 2], b"filenames": [b"a.png", b"b.png"]}
        (source / f"data_batch_{number}").write_bytes(pickle.dumps(batch, pickling.get("protocol", 2)))
    return source, [], {"airplane": 7, "automobile": 3}


def cifar100(folder):
    path, files = folder / "cifar-100-python.tar.gz", []
    for split in ("test", "train"):
        batch = {"data": rows(5, 32), "fine_labels": [0, 1, 2, 1, 1], "coarse_labels": [0, 1, 0, 1, 1]}
        files.append((f"cifar-100-python/{split}", pickle.dumps(batch, 4)))
    meta = {"fine_label_names": ["apple", "aquarium_fish", "baby"], "coarse_label_names": ["x", "y"]}
    files.append(("cifar-100-python/meta", pickle.dumps(meta)))
    path.write_bytes(gzip.compress(tar_of(files)))
    return path, [], {"apple": 1, "aquarium-fish": 3, "baby": 1}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(folder, images=None, labels=None):
    source = folder / "mnist"
    source.mkdir()
    labels = np.arange(12, dtype=np.uint8) % 10 if labels is None else labels
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8) if images is None else images
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (source / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    return source, [], {str(digit): 1 + (digit < 2) for digit in range(10)}


def write_images(folder, names, **size):
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(seed, "PNG" if name.endswith("png") else "JPEG", **size))
    return folder


def ffhq(folder):
    source = write_images(folder / "thumbnails", ["00000/00000.png", "00000/00001.png", "01000/01000.png"])
    return source, ["--size", 8], {"ffhq": 3}


def afhq(folder):
    source = write_images(folder / "train", ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "wild/1.png"])
    return source, ["--format", "jpeg"], {"cat": 2, "dog": 1, "wild": 1}


def celeba(folder):
    source = write_images(folder / "img_align_celeba", ["000001.jpg", "000002.jpg", "000003.jpg"])
    table = "3\nMale Smiling\n000001.jpg -1  1\n000002.jpg  1 -1\n000003.jpg -1 1\n"
    (folder / "list_attr_celeba.txt").write_text(table)
    return source, ["--attribute", "Smiling"], {"Smiling": 2, "not-Smiling": 1}


def parquet(folder):
    source = folder / "hub"
    source.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": ["tench", "golden retriever"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata)
    for shard, labels in enumerate([[0, 1, 1], [0, 0]]):
        images = [{"bytes": packed(shard * 10 + n), "path": None} for n in range(len(labels))]
        pq.write_table(pa.table([images, labels], schema=schema), source / f"train-0000{shard}-of-00002.parquet")
    return source, [], {"golden-retriever": 2, "tench": 3}


def folder(folder):
    return write_images(folder / "pets", ["cat/1.jpg", "dog/a/2.png", "cat/3.png"]), [], {"cat": 2, "a": 1}


def shards(folder):
    source = write_images(folder / "pets", ["cat/1.jpg", "dog/2.png", "cat/3.png"])
    for name in ("cat/1", "dog/2"):
        (source / f"{name}.txt").write_text(f"a {name}\nan animal")
    return source, [], {"cat": 2, "dog": 1}


def emoji(folder):
    source, noto, twemoji = folder / "table", folder / "noto-emoji", folder / "twemoji"
    table = []
    for code, category in (("1F355", "Food & Drink"), ("0023-FE0F-20E3", "Symbols"), ("2764-FE0F", "Symbols")):
        row = {"name": f"NAME {code}", "unified": code, "short_name": "a_b-c", "category": category}
        table.append({**row, "subcategory": "s", "has_img_google": True, "has_img_twitter": True})
    write_images(noto / "png/128", ["emoji_u1f355.png", "emoji_u0023_20e3.png", "emoji_u2764.png"], height=72, width=70)
    write_images(twemoji / "assets/72x72", ["1f355.png", "23-20e3.png", "2764.png"], height=72, width=72)
    source.mkdir()
    (source / "emoji.json").write_text(json.dumps(table))
    return source, ["--google", noto, "--twitter", twemoji], {"food": 2, "symbols": 4}


SOURCES = {
    maker.__name__: maker
    for maker in (imagenet, imagenet64, lsun, cifar, mnist, ffhq, afhq, celeba, parquet, folder, shards, emoji)
}
