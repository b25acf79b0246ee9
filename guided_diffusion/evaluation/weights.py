"""The weights of the Inception network: where they are looked for, and the files that hold them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch as th

from ..networks.architecture import architecture
from ..runtime import files, paths
from ..training import checkpoints, weights
from .downloads import SOURCES, kept_at
from .inception import InceptionNetwork

VARIABLE = "GUIDED_DIFFUSION_INCEPTION"  # of the environment, with the path of the file
SOURCE = SOURCES["inception"]
COUNTER = "num_batches_tracked"  # a number that some files have for each layer, and no prediction depends on


def find_inception(given: str = "") -> str:
    """The file of the weights: the one given, else that of $GUIDED_DIFFUSION_INCEPTION, else the one in the cache.

    :raises FileNotFoundError: if there is none, or the one that is named does not exist.
    """
    for origin, path in (("--inception_weights", given), (f"${VARIABLE}", os.environ.get(VARIABLE, ""))):
        if path and paths.exists(path):
            return paths.resolve(path)
        if path:
            raise FileNotFoundError(f"{origin} {files.quoted(path)} does not exist: {_remedy()}")
    if os.path.exists(kept_at(SOURCE)):
        return kept_at(SOURCE)
    raise FileNotFoundError(f"the weights of the Inception network are missing: {_remedy()}")


def _remedy() -> str:
    return (
        f"give {SOURCE.file} as --inception_weights or ${VARIABLE}, or put it at {kept_at(SOURCE)}, which "
        "'python scripts/download.py inception' does"
    )


def load_inception(path: str, *, dtype: th.dtype = th.float32) -> InceptionNetwork:
    """The network with the weights of a file (.pth, .pt, .safetensors) with torch-fidelity's names.

    :param dtype: what its convolutions compute in.
    :raises OSError, ValueError: if the file cannot be read, or holds something else, which the message then names.
    """
    state = _read(path)
    network = InceptionNetwork(dtype=dtype)
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.endswith(COUNTER)}
    whole = {**{name: own[name] for name in own if name.endswith(COUNTER)}, **state}
    faults = list(weights.tensor_differences(whole, own))
    if faults:
        raise _refusal(path, f"{likeness(state)}; {'; '.join(faults)}")
    network.load_state_dict(whole)
    return network


def _read(path: str) -> dict[str, th.Tensor]:
    if not paths.exists(path):
        raise FileNotFoundError(f"the Inception weights {files.quoted(path)} do not exist: {_remedy()}")
    kind = "" if paths.is_remote(path) else files.kind_of_file(path)
    if kind:
        raise _refusal(path, kind)
    state = checkpoints.load(path)
    if isinstance(state, dict) and {"state", "param_groups"} <= set(state):
        raise _refusal(path, "the state of an optimizer")
    if not isinstance(state, dict) or not all(isinstance(value, th.Tensor) for value in state.values()):
        raise _refusal(path, "something else than a state dict, which is names and tensors")
    return state


def _refusal(path: str, what: str) -> ValueError:
    return ValueError(f"{path} does not hold the weights of the Inception network but {what}: {_remedy()}")


def likeness(state: Mapping[str, th.Tensor]) -> str:
    """What a state dict seems to be the weights of."""
    if any(name.startswith("AuxLogits.") for name in state) or len(state.get("fc.weight", ())) == 1000:
        return "those of torchvision's Inception, another one"
    found = architecture(state)
    if found:
        return f"those of a {'classifier' if 'classifier_width' in found else 'U-Net'} for diffusion"
    return "those of another network"
