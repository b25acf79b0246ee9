"""The weights of the Inception network: where they are looked for, and the files that hold them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping

import torch as th

from evaluations.frozen_graph import inception_state_dict, read_frozen_graph
from evaluations.inception import InceptionNetwork
from guided_diffusion import checkpoint, paths, untrusted
from guided_diffusion.architecture import architecture
from guided_diffusion.downloads import SOURCES, kept_at

VARIABLE = "GUIDED_DIFFUSION_INCEPTION"  # of the environment, with the path of the file
KEPT = ("inception", "inception_graph")  # what is taken from the cache, in this order
COUNTER = "num_batches_tracked"  # a number that some files have for each layer, and no prediction depends on
TORCHSCRIPT = "a TorchScript archive, which --features torchscript:PATH takes"

State = Mapping[str, th.Tensor]


# ---- where they are


def find_inception(given: str = "") -> str:
    """The file of the weights: the one given, else that of $GUIDED_DIFFUSION_INCEPTION, else one in the cache.

    :raises FileNotFoundError: if there is none, or the one that is named does not exist.
    """
    for origin, path in (("--inception_weights", given), (f"${VARIABLE}", os.environ.get(VARIABLE, ""))):
        if path and paths.exists(path):
            return paths.resolve(path)
        if path:
            raise FileNotFoundError(f"{origin} {untrusted.quoted(path)} does not exist: {_remedy()}")
    for name in KEPT:
        if os.path.exists(kept_at(SOURCES[name])):
            return kept_at(SOURCES[name])
    raise FileNotFoundError(f"the weights of the Inception network are missing: {_remedy()}")


def _remedy() -> str:
    source = SOURCES[KEPT[0]]
    return (
        f"give the file as --inception_weights or ${VARIABLE}, or put it at {kept_at(source)}, which "
        f"'python scripts/download.py {KEPT[0]}' does"
    )


# ---- what they are


def load_inception(path: str, *, dtype: th.dtype = th.float32) -> InceptionNetwork:
    """The network with the weights of a file: a state dict (.pth, .pt, .safetensors) or the frozen graph (.pb).

    :param dtype: what its convolutions compute in.
    :raises OSError, ValueError: if the file cannot be read, or holds something else, which the message then names.
    """
    state = _read(path)
    network = InceptionNetwork(dtype=dtype)
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.endswith(COUNTER)}
    whole = {**{name: own[name] for name in own if name.endswith(COUNTER)}, **state}
    faults = list(checkpoint.tensor_differences(whole, own))
    if faults:
        raise _refusal(path, f"{likeness(state)}; {'; '.join(faults)}")
    network.load_state_dict(whole)
    return network


def _read(path: str) -> dict[str, th.Tensor]:
    if not paths.exists(path):
        raise FileNotFoundError(f"the Inception weights {untrusted.quoted(path)} do not exist: {_remedy()}")
    kind = "" if paths.is_remote(path) else kind_of(path)
    if kind:
        raise _refusal(path, kind)
    if path.endswith(".pb"):
        return _of_graph(path)
    state = checkpoint.load(path)
    if isinstance(state, dict) and {"state", "param_groups"} <= set(state):
        raise _refusal(path, "the state of an optimizer")
    if not isinstance(state, dict) or not all(isinstance(value, th.Tensor) for value in state.values()):
        raise _refusal(path, "something else than a state dict, which is names and tensors")
    return state


def _of_graph(path: str) -> dict[str, th.Tensor]:
    constants = read_frozen_graph(path)
    try:
        return inception_state_dict(constants)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _refusal(path: str, what: str) -> ValueError:
    return ValueError(f"{path} does not hold the weights of the Inception network but {what}: {_remedy()}")


def likeness(state: State) -> str:
    """What a state dict seems to be the weights of."""
    if any(name.startswith("AuxLogits.") for name in state) or len(state.get("fc.weight", ())) == 1000:
        return "those of torchvision's Inception, another one"
    found = architecture(state)
    if found:
        return f"those of a {'classifier' if 'classifier_width' in found else 'U-Net'} for diffusion"
    marks = {"blocks.0.attn.qkv.weight": "a vision transformer", "visual.conv1.weight": "CLIP"}
    return f"those of {next((what for name, what in marks.items() if name in state), 'another network')}"


def kind_of(path: str) -> str:
    """What lies at a local path, if that shows that it is no weights; '' where it may be.

    :raises OSError: if there is nothing.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        return "a folder" if os.path.isdir(path) else "no regular file"
    with open(path, "rb") as file:
        head = file.read(64)
    if head.lstrip()[:1] == b"<":
        return "a web page"
    if head.startswith(b"version https://git-lfs"):
        return "the pointer that Git LFS leaves in place of a file"
    return _kind_of_zip(path) if head.startswith(b"PK") and zipfile.is_zipfile(path) else "" if head else "nothing"


def _kind_of_zip(path: str) -> str:
    with untrusted.open_archive(path) as archive:
        names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        return "an npz, which is images or their statistics"
    if any(name.endswith("models/model.json") for name in names):
        return "an exported program, which --features export:PATH takes"
    if any(name.endswith("/constants.pkl") for name in names):
        return TORCHSCRIPT
    return ""
