"""Opening the published networks of GLIDE (Nichol et al. 2021): base, upsampler, and those that paint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..networks.architecture import GLIDE
from ..networks.glide import Text2ImUNet
from ..runtime import files
from ..runtime.errors import refuse
from ..script_util import create_gaussian_diffusion
from ..training.published import is_glide, tensors_in
from ..training.weights import load
from .common import network_of_glide

if TYPE_CHECKING:
    from ..respace import SpacedDiffusion
    from ..training.checkpoints import Checkpoint


def load_glide(path: str, timestep_respacing: str = "") -> tuple[Text2ImUNet, SpacedDiffusion]:
    """A network of GLIDE in evaluation mode, on the CPU, and its process, for tokens of one's own.

    The images of ``network.padded(ids)``, ids of GPT-2's byte-pair encoding of a text in lower case, are::

        network, process = load_glide("base.pt", "100")
        words = dict(zip(("tokens", "mask"), network.padded([ids])))
        images = process.p_sample_loop(network, (1, 3, 64, 64), model_kwargs=words)

    An upsampler takes `low_res` too, one that paints `inpaint_image` and `inpaint_mask`.

    :param timestep_respacing: as `space_timesteps` takes it; '' for all 1000.
    """
    state = tensors_in(load(path, inert=True))
    refuse((not is_glide(state), f"{path} holds no network of GLIDE: give its base.pt, upsample.pt or the like"))
    network = network_of_glide(state, path)
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    schedule = "linear" if network.enlarges else "cosine"
    process = create_gaussian_diffusion(
        learn_sigma=True, noise_schedule=schedule, timestep_respacing=timestep_respacing
    )
    return network, process


def upsampler_beside(checkpoint: Checkpoint) -> list[str]:
    """The upsampler in the folder of a base network of GLIDE, by the names that they are published under."""
    folder, name = os.path.split(checkpoint.path)
    path = files.join(folder or ".", name.replace("base", "upsample"))
    return [path] if checkpoint.flags.get("text_encoder") == GLIDE and "base" in name and files.exists(path) else []
