"""Weights in files, a run's own and other programs': what a network takes of them, and in what they differ from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch as th

from .. import logger
from ..networks.architecture import architecture, networks_in
from ..runtime.files import printable
from . import checkpoints

_SHOWN, _KEYS = 3, 12
_AVERAGE = re.compile(r"(?<![a-zA-Z])ema(?![a-zA-Z])", re.IGNORECASE)  # in a place such as model_ema.module


def load_weights(model: th.nn.Module, path: str, flags: Mapping[str, Any] | None = None) -> None:
    """Load a checkpoint into a network that was built from `flags`.

    :raises ValueError: as `fitting_weights`.
    """
    model.load_state_dict(fitting_weights(model, path, flags))


def fitting_weights(model: th.nn.Module, path: str, flags: Mapping[str, Any] | None = None) -> dict[str, th.Tensor]:
    """The weights of a checkpoints, as a network that was built from `flags` takes them; it may be on the meta device.

    :param flags: only the sizes are read, for naming attention resolutions in messages.
    :raises ValueError: if the file is no weights, or fits other flags, which the message then names.
    """
    return fitting(model.state_dict(), path, flags)


def fitting(own: Mapping[str, th.Tensor], path: str, flags: Mapping[str, Any] | None = None) -> dict[str, th.Tensor]:
    """As `fitting_weights`, of the state dict of a network."""
    state, choice = weights_of(path)
    if choice:
        logger.log(choice)
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        size = next((flags[key] for key in ("large_size", "image_size") if flags and key in flags), None)
        raise ValueError(f"{path} does not fit the flags: {difference(state, own, size)}")
    return state


def weights_of(path: str) -> tuple[dict[str, th.Tensor], str]:
    """The weights in a file, whatever else another program saved with them, and a sentence that says which.

    Of several networks of this package an average (EMA) is taken, else the first.

    :return: the sentence is '' where nothing but weights is there.
    :raises ValueError: if it holds none, or numbers that are not finite.
    """
    content = checkpoints.load(path, inert=True)
    found = dict(networks_in(content)) or {"": _plain_weights(content, path)}
    place = max(found, key=lambda place: len(_AVERAGE.findall(place)))
    state = found[place]
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{path} holds numbers that are not finite, in {len(bad)} of its {len(state)} tensors ({bad[0]} is the "
            "first): training has diverged, take an earlier checkpoint"
        )
    others = [name or "its top level" for name in found if name != place]
    left = f", not those at {', '.join(others)}" if others else ""
    return state, f"of {path} the weights at {place or 'its top level'} are taken{left}" if place or others else ""


def _plain_weights(content: Any, path: str) -> dict[str, th.Tensor]:
    """A state dict of some other network.

    :raises ValueError: saying what the file holds, if it is none.
    """
    optimizer = isinstance(content, dict) and {"state", "param_groups"} <= set(content)
    if isinstance(content, dict) and not optimizer and all(isinstance(value, th.Tensor) for value in content.values()):
        wrapped = all(name.startswith("module.") for name in content)  # saved from inside a data-parallel wrapper
        return {name.removeprefix("module."): value for name, value in content.items()} if wrapped else content
    beside = checkpoints.weights_beside(path)
    what = "optimizer state" if optimizer else f"no weights of a network of this package, but {_held(content)}"
    remedy = f"use {beside} beside it" if beside else "use a file ema_RATE_NNNNNN.pt or modelNNNNNN.pt"
    if any(
        isinstance(value, checkpoints.Inert) for value in (content.values() if isinstance(content, dict) else [content])
    ):
        remedy = "save the state_dict() of its network, and use that"
    raise ValueError(f"{path} holds {what}: {remedy}")


def _held(content: Any) -> str:
    """What a file holds, by keys and kinds."""

    def kind(value: Any) -> str:
        of = type(value)
        name = of.__qualname__ if of.__module__ == "builtins" else f"{of.__module__}.{of.__qualname__}"
        return f"{name} of {len(value)}" if isinstance(value, dict | list | tuple) else printable(name)

    if not isinstance(content, dict):
        return f"one object ({kind(content)})"
    keys = [f"{key!r:.50} ({kind(value)})" for key, value in content.items()]
    return ", ".join(keys[:_KEYS]) + (f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else "")


def difference(theirs: Mapping[str, th.Tensor], ours: Mapping[str, th.Tensor], size: Any) -> str:
    """The flags, else the tensors, in which a checkpoint and a network differ."""
    there, here = architecture(theirs, size), architecture(ours, size)
    flags = [
        f"the checkpoint has {name} {_shown(there[name])}, you gave {_shown(here[name])}{_about(name, there, here)}"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if set(there) - set(here) and not set(here) & set(there) - {"image_channels", "dims", "num_classes", "image_size"}:
        flags = ["the checkpoint is of another kind of network"]
    return "; ".join(flags or tensor_differences(theirs, ours))


def _about(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What a message adds where the numbers of classes differ as if one of them counted a null class."""
    counted = name == "num_classes" and "class_cond" in here and abs(there[name] - here[name]) == 1
    return " (counting the row that --null_class True adds)" if counted else ""


def _shown(value: Any) -> str:
    return str(value) or "''"


def tensor_differences(theirs: Mapping[str, th.Tensor], ours: Mapping[str, th.Tensor]) -> Iterator[str]:
    """Names and shapes in which a state dict, perhaps a stranger's, differs from ours; nothing where it fits."""
    missing = [name for name in ours if name not in theirs]
    unknown = [name for name in theirs if name not in ours]
    other = [
        f"{name} {list(theirs[name].shape)} instead of {list(ours[name].shape)}"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    for names, what in ((missing, "missing"), (unknown, "unknown"), (other, "of another shape")):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{what}: {', '.join(map(printable, names[:_SHOWN]))}{more}"
