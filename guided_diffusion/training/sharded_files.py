"""Checkpoints in parts: each rank of --fsdp writes its rows of every tensor, and any number of ranks can read them.

The folder shardsNNNNNN is one of torch.distributed.checkpoint: tensors alone, by the names "model/NAME",
"ema_RATE/NAME", "power_WIDTH/NAME" and "opt/INDEX.KEY". Its index ".metadata" comes last.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
import torch.distributed as dist

from ..runtime.errors import UserError, reason, refuse

INDEX = ".metadata"
# what an index of tensors is made of; a pickle may name anything else, and run it
_OF_INDEX = "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata"
_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in [*_OF_INDEX.split(), "_MEM_FORMAT_ENCODING"]),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),  # the folder
    ("torch", "float32"),
}

Parts = Mapping[str, Mapping[str, th.Tensor]]


def write(folder: str, parts: Parts, group: dist.ProcessGroup | None) -> None:
    """Write the parts of this rank; every rank calls it, and leaves it when all have written.

    :param parts: name -> name -> tensor, a DTensor where it is split.
    :param group: of all ranks, for CPU tensors, that nobody else uses meanwhile.
    """
    import torch.distributed.checkpoint as dcp  # slow to import, and used by few

    flat = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    dcp.save(flat, storage_writer=dcp.FileSystemWriter(folder), process_group=group)


class _Index(pickle.Unpickler):
    """Reads an index, and no other object."""

    def find_class(self, module: str, name: str) -> Any:
        """A class that an index may name."""
        refuse(((module, name) not in _NAMES, f"it names {module}.{name}"))
        return super().find_class(module, name)


def read(folder: str, wanted: Callable[[str], bool]) -> dict[str, dict[str, th.Tensor]]:
    """The whole tensors of the parts whose names are wanted, in the memory of the CPU.

    :raises UserError: for a folder that is damaged, or holds anything but tensors.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            with open(os.path.join(folder, INDEX), "rb") as file:
                metadata: Metadata = _Index(file).load()
            refuse((not isinstance(metadata, Metadata), "it is no index"))
            return metadata

    try:
        reader = Reader(folder)
        every = reader.read_metadata().state_dict_metadata
        tensors = {name: entry for name, entry in every.items() if isinstance(entry, TensorStorageMetadata)}
        held = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
        more = len(tensors) < len(every) or 4 * sum(entry.size.numel() for entry in tensors.values()) > held
        refuse((more, "it holds more than tensors, or less than their numbers"))
        entries = {name: entry for name, entry in tensors.items() if wanted(name.partition("/")[0])}
        flat: dict[str, Any] = {n: th.empty(entry.size, dtype=entry.properties.dtype) for n, entry in entries.items()}
        with warnings.catch_warnings():  # that ranks read on their own is meant
            warnings.simplefilter("ignore")
            dcp.load(flat, storage_reader=reader, no_dist=True)
    except (MemoryError, th.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # an unpickler raises whatever its bytes lead it to
        raise UserError(f"{folder} cannot be read as a sharded checkpoint: {reason(error)}") from error
    parts: dict[str, dict[str, th.Tensor]] = {}
    for name, value in flat.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = value
    return parts
