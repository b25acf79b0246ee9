"""Opening trained autoencoders, ours and other programs'."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch as th
from torch import nn

from ..networks.autoencoder import NORM_GROUPS, AutoencoderKL, VQModel
from ..nn import GROUPS
from ..runtime.errors import WHY, UserError, as_user_error, refuse
from . import diffusers_files
from .checkpoints import open_checkpoint
from .published import FIRST_STAGE, tensors_in
from .weights import load, tensor_differences

STABLE_DIFFUSION_SCALE = 0.18215  # of the KL-f8 autoencoder with 4 channels of Stable Diffusion 1
NOMINAL_RESOLUTION = 256  # says at which levels there is attention, for any size of images


def read_autoencoder(state: Mapping[str, th.Tensor]) -> AutoencoderKL | VQModel:
    """An untrained network of the architecture that weights show.

    :raises KeyError: naming a weight that is missing.
    """
    ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = {int(match[1]) for name in state if (match := re.match(r"encoder\.down\.(\d+)\.block\.", name))}
    blocks = {name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in sorted(levels)]
    attends = [level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in state]
    z_channels = state["decoder.conv_in.weight"].shape[1]
    ddconfig = {
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": len(blocks),
        "attn_resolutions": [NOMINAL_RESOLUTION // 2**level for level in attends],
        "resolution": NOMINAL_RESOLUTION,
        "in_channels": in_channels,
        "out_ch": state["decoder.conv_out.weight"].shape[0],
        "z_channels": z_channels,
        NORM_GROUPS: int(state.get(NORM_GROUPS, GROUPS)),
        "double_z": state["encoder.conv_out.weight"].shape[0] == 2 * z_channels,
    }
    embed_dim = state["post_quant_conv.weight"].shape[1]
    codes = state.get("quantize.embedding.weight")
    with th.device("meta"):
        return AutoencoderKL(ddconfig, embed_dim) if codes is None else VQModel(ddconfig, len(codes), embed_dim)


def load_autoencoder(path: str) -> tuple[AutoencoderKL | VQModel, float]:
    """A frozen autoencoder in evaluation mode, on the CPU, and the factor of its latents in diffusion.

    The architecture is read off the weights.

    :param path: a run of autoencoder_train, one of its checkpoints, or a file (.ckpt, .pt, .safetensors) of
        latent-diffusion or Stable Diffusion, of the autoencoder alone or with a diffusion model; or a folder of an
        AutoencoderKL of diffusers.
    """
    files = open_checkpoint(path)
    tensors = diffusers_files.read_autoencoder(tensors_in(load(files.path, inert=True)), files.path)
    first = next((name for name in tensors if re.fullmatch(r"(.*\.)?encoder\.conv_in\.weight", name)), None)
    if first is None:
        raise UserError(f"{files.path} holds no autoencoder: give one of latent-diffusion, or a run's folder")
    prefix = first.removesuffix("encoder.conv_in.weight")
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    with as_user_error(f"{files.path} holds no whole autoencoder: {WHY}", LookupError, ValueError, ArithmeticError):
        network = read_autoencoder(state)
        weights = {name: state[name].float() for name in network.state_dict() if name in state}
        refuse((faults := "; ".join(tensor_differences(weights, network.state_dict())), faults))
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False)
    saved = load(files.state).get("extra", {}).get("scale") if files.state else None
    factor = saved["factor"] if saved else _published_scale(network, prefix, tensors)
    return network, float(factor)


def _published_scale(network: nn.Module, prefix: str, tensors: Mapping[str, th.Tensor]) -> float:
    """The factor that a file of another program holds, or that its authors tell; 1 where neither is known."""
    if "scale_factor" in tensors:
        return float(tensors["scale_factor"])
    known = isinstance(network, AutoencoderKL) and (network.factor, network.embed_dim) == (8, 4)
    return STABLE_DIFFUSION_SCALE if known and prefix.startswith(FIRST_STAGE) else 1.0
