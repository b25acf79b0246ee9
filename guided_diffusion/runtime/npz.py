"""Arrays in npz files, written and read chunk by chunk, and fingerprints of arrays."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch as th

from . import files
from .atomic import replacing
from .errors import WHY, as_user_error, printable, refuse

PROMPTS = "prompts"  # the array of texts that images were made for
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of images, as the evaluator keeps them


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """16 hex digits that stand for names, shapes and values of tensors or arrays, e.g. of a state dict."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        tensor = value if isinstance(value, th.Tensor) else th.from_numpy(np.array(value))
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.view(-1).view(th.uint8).numpy().data)
    return digest.hexdigest()[:16]


Rows = tuple[tuple[int, ...], Any, Iterable[npt.NDArray[Any]]]  # shape, dtype, chunks along the first axis


def write_arrays(path: str, arrays: Mapping[str, Rows | npt.NDArray[Any]]) -> None:
    """Write arrays by name, chunk by chunk or as they are; the same arrays give the same bytes."""
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            shape, dtype, chunks = array if isinstance(array, tuple) else (array.shape, array.dtype, [array])
            info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            info.create_system, info.external_attr = 3, 0o600 << 16
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.writelines(np.ascontiguousarray(chunk, dtype).data for chunk in chunks)


def save_npz(path: str, *arrays: Rows | npt.NDArray[Any]) -> None:
    """The same of arr_0, arr_1, ..."""
    write_arrays(path, {f"arr_{number}": array for number, array in enumerate(arrays)})


def read_npz(path: str, name: str, rows: int) -> Iterator[npt.NDArray[Any]]:
    """Chunks of `rows` rows of one array of an npz, without holding more than one of them."""
    with Npz(path) as archive:
        yield from archive.chunks(name, rows)


class Npz:
    """The arrays of a local or remote npz that may be anybody's: their headers, and as many rows as are asked for."""

    def __init__(self, path: str) -> None:
        self.path = path
        with self._explained():
            self._archive = files.open_archive(path)

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._archive.NameToInfo

    def header(self, name: str) -> files.Header:
        """Shape and type of an array, of which nothing is read."""
        with self._opened(name) as (_, header):
            return header

    def place(self, name: str) -> int:
        """Where an array begins in the file; -1 if it is packed or in a bucket."""
        member = self._archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED or files.is_remote(self.path):
            return -1
        with files.open_file(self.path) as file:
            return files.member_place(file.fileno(), member)

    def names(self) -> list[str]:
        """Names of the arrays, in the order of the file."""
        return [name.removesuffix(".npy") for name in self._archive.NameToInfo if name.endswith(".npy")]

    def chunks(self, name: str, rows: int) -> Iterator[npt.NDArray[Any]]:
        """An array, `rows` rows at a time; one in the order of Fortran is held as a whole."""
        with self._opened(name) as (member, header):
            whole = files.read_numbers(member, header) if header.fortran else None
            for start in range(0, header.shape[0], rows):
                shape = (min(rows, header.shape[0] - start), *header.shape[1:])
                if whole is None:
                    yield files.read_rows(member, shape, header.dtype)
                else:
                    yield np.ascontiguousarray(whole[start : start + rows])

    def whole(self, name: str) -> npt.NDArray[Any]:
        """All of an array."""
        with self._opened(name) as (member, header):
            array = files.read_numbers(member, header)
            refuse((member.read(1), "there is more behind its numbers"))
            return array

    def texts(self, name: str) -> list[str]:
        """An array of texts, as numpy keeps them without pickling."""
        with self._explained(f"{name} cannot be read, "):
            member = self._archive.getinfo(f"{name}.npy")
            refuse((fault := files.member_fault(member), fault))
            content = io.BytesIO(files.read_member(self._archive, member))
            header = files.read_header(content, kinds="U")
            texts: list[str] = np.frombuffer(content.read(), header.dtype).reshape(header.shape).tolist()
            return texts

    def name_of_images(self) -> str:
        """The name of the array of images: arr_0, or the only one with two axes or more that is no statistic."""
        if "arr_0" in self:
            return "arr_0"
        names = [name for name in self.names() if name not in STATISTICS and len(self.header(name).shape) > 1]
        unclear = "and it is not clear which are images: save them as arr_0"
        refuse((len(names) != 1, f"{self.path} holds {self.content()}, {unclear}"))
        return names[0]

    def labels(self) -> list[int] | None:
        """The class ids in arr_1, one for each image of arr_0; None where there are none."""
        if "arr_0" not in self or "arr_1" not in self:
            return None
        count, labels = self.header("arr_0").shape[0], self.header("arr_1")
        whole = labels.shape == (count,) and labels.dtype.kind in "iu"
        ids: list[int] = self.whole("arr_1").tolist() if whole else []
        odd, found = len(ids) != count or max(ids, default=0) >= 2**63, f"arr_1 {labels.shape} of {labels.dtype}"
        refuse((odd, f"{self.path} holds labels {found}: give one class id for each of the {count} images, or none"))
        return ids

    def content(self) -> str:
        """The names of the first arrays, for messages."""
        return ", ".join(map(printable, self.names()[:8])) or "no array"

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[IO[bytes], files.Header]]:
        refuse((name not in self, f"{self.path} holds no {name}, but {self.content()}"))
        with self._explained(f"{name} cannot be read, "), self._archive.open(f"{name}.npy") as member:
            header = files.read_header(member)
            refuse((not header.shape, "it is one number, no array"))
            yield member, header

    def _explained(self, task: str = "") -> AbstractContextManager[None]:
        """Of every error, as zipfile does not say what a damaged member leads it to."""
        return as_user_error(f"{self.path} is no npz with rows of numbers ({task}{WHY}): make or copy it again")


def holds(path: str, *arrays: tuple[tuple[int, ...], Any]) -> bool:
    """Whether a file is there with arr_0, arr_1, ... of these shapes and types, by its directory and headers."""
    try:
        with Npz(path) as archive:
            headers = [archive.header(f"arr_{number}")[:2] for number in range(len(arrays))]
    except (OSError, ValueError):
        return False
    return headers == [(shape, np.dtype(kind)) for shape, kind in arrays]
