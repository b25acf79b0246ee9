"""The weights of the Inception network: where they are published, finding them, reading them.

A file that others publish is an entry of `SOURCES`; ``python scripts/download.py NAME`` fetches it.
"""

from __future__ import annotations

import os
from typing import Any

import torch as th

from ..runtime import files
from ..runtime.downloads import Source
from ..runtime.errors import WHY, as_user_error, printable, quoted, refuse
from .inception import InceptionNetwork

VARIABLE = "GUIDED_DIFFUSION_INCEPTION"  # of the environment, with the path of the file
COUNTER = "num_batches_tracked"  # a number that some files have for each layer, and no prediction depends on


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


def find_inception(path: str = "") -> str:
    """The file of the weights: the one given, else that of $GUIDED_DIFFUSION_INCEPTION, else the one in the cache."""
    named = files.resolve(path or os.environ.get(VARIABLE) or INCEPTION.cached)
    if not files.exists(named):
        fault = f"{quoted(named)} does not exist"
        raise FileNotFoundError(f"the weights of the Inception network are missing ({fault}): {_remedy()}")
    return named


def _remedy() -> str:
    return (
        f"give {INCEPTION.file} as --inception_weights or ${VARIABLE}, or put it at {INCEPTION.cached}, which "
        "'python scripts/download.py inception' does"
    )


def load_inception(path: str, *, dtype: th.dtype = th.float32) -> InceptionNetwork:
    """The network with the weights of a file (.pth, .pt, .safetensors) with torch-fidelity's names.

    :param dtype: what its convolutions compute in.
    """
    network = InceptionNetwork(dtype=dtype)
    expected = {name: value.shape for name, value in network.state_dict().items() if not name.endswith(COUNTER)}
    kind = "" if files.is_remote(path) or not os.path.exists(path) else files.kind_of_file(path)
    fault = f"it is {kind}" if kind else WHY
    with as_user_error(f"{path} does not hold the weights of the Inception network ({fault}): {_remedy()}"):
        state = _read(path)
        tensors = isinstance(state, dict) and all(isinstance(value, th.Tensor) for value in state.values())
        refuse((not tensors, "it is no state dict"))
        state = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
        for name in (*expected, *state):
            shape = list(state[name].shape) if name in state else "missing"
            needed = list(expected[name]) if name in expected else "none"
            refuse((shape != needed, f"{printable(name)} is {shape} in place of {needed}"))
    network.load_state_dict(state)
    return network


def _read(path: str) -> Any:
    """The tensors of a file."""
    if not files.is_remote(path) and os.path.isfile(path):
        files.check_unpacked(path)
    with files.open_file(path) as file:
        if path.endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load(file.read())
        return th.load(file, map_location="cpu", weights_only=True)
