"""Randomness by key: the draws of an image or a batch depend on the seed and its index alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch as th


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`: 64 bits of which the low 32 differ for all indices of one seed.

    torch's CPU generator looks at 32 bits alone. Hashed freely, two of 50,000 images would be the same picture in one
    run out of four, so the low half is a permutation of the index (an affine map, then murmur3's finalizer).
    """
    start, factor, high = _words(seed)
    low = (index * (factor | 1) + start) & 0xFFFFFFFF
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        low = (low ^ low >> shift) * odd & 0xFFFFFFFF
    return ((high ^ index >> 32) & 0x7FFFFFFF) << 32 | low


@lru_cache(maxsize=16)
def _words(seed: int) -> tuple[int, ...]:
    """Three words of 32 bits that all images of a seed have in common."""
    return tuple(int(word) for word in np.random.SeedSequence(seed, spawn_key=(0,)).generate_state(3))


def image_generator(seed: int, index: int, device: th.device | str = "cpu") -> th.Generator:
    """The generator of everything random in one image."""
    return th.Generator(device).manual_seed(image_seed(seed, index))


def to_device(tensor: th.Tensor, device: th.device | str) -> th.Tensor:
    """A tensor on a device; a copy to a CUDA device is from pinned memory, so that the host does not wait for it."""
    if th.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # elsewhere a copy that is not waited for could read memory that is another's by then


@contextlib.contextmanager
def seeded(seed: int, batch: int, device: th.device | str = "cpu") -> Iterator[None]:
    """torch's global generators seeded by (seed, batch), and afterwards as they were.

    For functions that take no generator, such as a cond_fn that cuts an image at random.
    """
    device = th.device(device)
    cuda = [device.index if device.index is not None else th.cuda.current_device()] if device.type == "cuda" else []
    state = int(np.random.SeedSequence(seed, spawn_key=(1, batch)).generate_state(1, np.uint64)[0]) >> 1
    with th.random.fork_rng(devices=cuda):
        th.default_generator.manual_seed(state)
        for index in cuda:
            th.cuda.default_generators[index].manual_seed(state)
        yield


def rng_state(device: th.device) -> dict[str, Any]:
    """The states of the global generators of torch, numpy and random, and of a GPU, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    numbers = [str(name), th.from_numpy(np.asarray(keys, np.int64)), *rest]
    gpu = {"cuda": th.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": th.get_rng_state(), "numpy": numbers, "python": random.getstate(), **gpu}


def set_rng_state(state: dict[str, Any], device: th.device) -> None:
    """Set the global generators to a state of `rng_state`."""
    th.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        th.cuda.set_rng_state(state["cuda"], device)
