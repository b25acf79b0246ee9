"""Diffusion models of images: training, sampling and classifier guidance.

A drop-in successor of openai/guided-diffusion and of crowsonkb's fork of it. Importing the package alone imports
nothing else, so that ``guided-diffusion --help`` answers at once: the names of `PUBLIC` are imported when they are
first asked for, and all others from the modules that they are in, such as ``guided_diffusion.script_util``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.pipeline import Samples as Samples, load as load
    from .sampling.guidance import classifier_guidance as classifier_guidance
    from .sampling.samplers import make_sampler as make_sampler

__version__ = "0.1.0"

PUBLIC = {
    "load": "commands.pipeline",
    "Samples": "commands.pipeline",
    "classifier_guidance": "sampling.guidance",
    "make_sampler": "sampling.samplers",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
