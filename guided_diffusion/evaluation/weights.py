"""The weights of the Inception network: fetching them, finding them, reading them.

A file that others publish is an entry of `SOURCES`; ``python scripts/download.py NAME`` fetches it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch as th

from ..networks.architecture import architecture
from ..runtime import files, paths
from ..runtime.errors import UserError
from ..training import checkpoints, weights
from .inception import InceptionNetwork

VARIABLE = "GUIDED_DIFFUSION_INCEPTION"  # of the environment, with the path of the file
COUNTER = "num_batches_tracked"  # a number that some files have for each layer, and no prediction depends on
TIMEOUT = 30.0  # seconds without a byte from a server


@dataclass(frozen=True)
class Source:
    """A file that others publish.

    :param urls: addresses of the same bytes, in the order in which they are tried.
    :param file: its name in the cache.
    :param sha256: in hex digits; the first of them are enough.
    :param size: in bytes.
    """

    urls: tuple[str, ...]
    file: str
    sha256: str
    size: int

    @property
    def cached(self) -> str:
        """Its path in the cache."""
        return os.path.join(paths.cache_folder(), self.file)


INCEPTION = Source(  # the published evaluator's graph as converted by pytorch-fid
    urls=(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    file="weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=95_628_359,
)
SOURCES = {"inception": INCEPTION}


# ---- fetching


def fetch(source: Source, path: str = "") -> str:
    """The path of a file, which is fetched unless it is there already.

    :param path: a file, or a folder for it; '' for the cache.
    :raises ValueError: if another file is in its place.
    :raises OSError: if no address gives it, or it cannot be written.
    """
    path = paths.local(path) or source.cached
    path = os.path.join(path, source.file) if os.path.isdir(path) else path
    if os.path.exists(path):
        _check(source, path)
        return path
    with files.explained(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    failures, timeout = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch sets none, and would wait for ever
    try:
        for url in source.urls:
            try:
                th.hub.download_url_to_file(url, path, hash_prefix=source.sha256)
            except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: another checksum
                failures.append(f"{url}: {files.reason(error)}")
            else:
                print(f"{path}: {os.path.getsize(path)} bytes, sha256 as published")
                return path
    finally:
        socket.setdefaulttimeout(timeout)
    raise OSError(
        f"{source.file} could not be fetched ({'; '.join(failures)}): try again later, or fetch {source.urls[0]} "
        f"({source.size} bytes) on another machine and put it at {path}"
    )


def _check(source: Source, path: str) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(source.sha256):
        raise UserError(
            f"{path} exists, but is not {source.file}: its sha256 is {digest}, not {source.sha256}; move it away or "
            "name another file with --out"
        )
    print(f"{path} is there already, sha256 as published")


# ---- finding and reading


def find_inception(path: str = "") -> str:
    """The file of the weights: the one given, else that of $GUIDED_DIFFUSION_INCEPTION, else the one in the cache.

    :raises FileNotFoundError: if there is none, or the one that is named does not exist.
    """
    for origin, named in (("--inception_weights", path), (f"${VARIABLE}", os.environ.get(VARIABLE, ""))):
        if named and not paths.exists(named):
            raise FileNotFoundError(f"{origin} {files.quoted(named)} does not exist: {_remedy()}")
        if named:
            return paths.resolve(named)
    if not os.path.exists(INCEPTION.cached):
        raise FileNotFoundError(f"the weights of the Inception network are missing: {_remedy()}")
    return INCEPTION.cached


def _remedy() -> str:
    return (
        f"give {INCEPTION.file} as --inception_weights or ${VARIABLE}, or put it at {INCEPTION.cached}, which "
        "'python scripts/download.py inception' does"
    )


def load_inception(path: str, *, dtype: th.dtype = th.float32) -> InceptionNetwork:
    """The network with the weights of a file (.pth, .pt, .safetensors) with torch-fidelity's names.

    :param dtype: what its convolutions compute in.
    :raises OSError, ValueError: if the file cannot be read or holds something else, which the message then names.
    """
    state = {name: value for name, value in _read(path).items() if not name.endswith(COUNTER)}
    network = InceptionNetwork(dtype=dtype)
    expected = {name: value for name, value in network.state_dict().items() if not name.endswith(COUNTER)}
    if differences := "; ".join(weights.tensor_differences(state, expected)):
        raise _refusal(path, f"{_likeness(state)}; {differences}")
    network.load_state_dict(state)
    return network


def _read(path: str) -> dict[str, th.Tensor]:
    if not paths.exists(path):
        raise FileNotFoundError(f"the Inception weights {files.quoted(path)} do not exist: {_remedy()}")
    if not paths.is_remote(path) and (kind := files.kind_of_file(path)):
        raise _refusal(path, kind)
    state = checkpoints.load(path)
    if isinstance(state, dict) and all(isinstance(value, th.Tensor) for value in state.values()):
        return state
    raise _refusal(path, "something else than a state dict, which is names and tensors")


def _refusal(path: str, content: str) -> UserError:
    return UserError(f"{path} does not hold the weights of the Inception network but {content}: {_remedy()}")


def _likeness(state: Mapping[str, th.Tensor]) -> str:
    if any(name.startswith("AuxLogits.") for name in state) or len(state.get("fc.weight", ())) == 1000:
        return "those of torchvision's Inception, another one"
    if flags := architecture(state):
        return f"those of a {'classifier' if 'classifier_width' in flags else 'U-Net'} for diffusion"
    return "those of another network"
