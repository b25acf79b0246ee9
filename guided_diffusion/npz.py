"""Arrays in npz files, written and read chunk by chunk, and names for what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch as th


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """16 hex digits that stand for names, shapes and values of tensors or arrays, e.g. of a state dict."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        tensor = value if isinstance(value, th.Tensor) else th.from_numpy(np.array(value))
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.view(-1).view(th.uint8).numpy().data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.part-{os.getpid()}"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_npz(path: str, *arrays: tuple[tuple[int, ...], Any, Iterable[npt.NDArray[Any]]]) -> None:
    """Write arr_0, arr_1, ... chunk by chunk; the same arrays give the same bytes.

    :param arrays: (shape, dtype, chunks along the first axis) of each.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for number, (shape, dtype, chunks) in enumerate(arrays):
            _write_member(archive, f"arr_{number}.npy", shape, np.dtype(dtype), chunks)


def _write_member(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: Iterable[npt.NDArray[Any]],
) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980
    info.create_system, info.external_attr = 3, 0o600 << 16
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for chunk in chunks:
            member.write(np.ascontiguousarray(chunk, dtype).data)


def save_npz(path: str, *arrays: npt.NDArray[Any]) -> None:
    """Write whole arrays as arr_0, arr_1, ...; the same arrays give the same bytes."""
    write_npz(path, *((array.shape, array.dtype, [array]) for array in arrays))


def read_npz(path: str, name: str, rows: int) -> Iterator[npt.NDArray[Any]]:
    """Chunks of `rows` rows of one array of an npz, without holding more than one of them."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        for start in range(0, shape[0], rows):
            size = (min(rows, shape[0] - start), *shape[1:])
            data = member.read(math.prod(size) * dtype.itemsize)
            yield np.frombuffer(data, dtype).reshape(size)
