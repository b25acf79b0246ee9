"""What files of latent-diffusion and Stable Diffusion 1 hold, as weights and flags of this package.

A file holds the U-Net behind `model.diffusion_model.`, perhaps its moving average (EMA) behind `model_ema.`, the
autoencoder behind `first_stage_model.`, the encoder of texts or labels behind `cond_stage_model.`, and the betas. What
leaves no trace in it are the heads, of which `_heads` tells those of the published networks, and the size of images.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from ..networks.architecture import GLIDE, Weights, architecture
from ..runtime.errors import UserError, listed, printable, refuse

UNET, AVERAGE = "model.diffusion_model.", "model_ema."
FIRST_STAGE, CONDITION = "first_stage_model.", "cond_stage_model."
FIRST = f"{FIRST_STAGE}encoder.conv_in.weight"
BERT, CLIP = f"{CONDITION}transformer.token_emb.weight", f"{CONDITION}transformer.text_model."
GLIDE_PLACES = "positional_embedding"
IMAGENET_ROWS = 1001  # of labels, of which the last means no class
SCHEDULE, USUAL_ENDS = "scaled_linear", (0.00085, 0.012)
SHOWN = 6

Tensors = Mapping[str, th.Tensor]


def tensors_in(content: Any) -> dict[str, th.Tensor]:
    """The tensors of a file by name, also those in its "state_dict"; {} where there are none."""
    inner = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    pairs = inner.items() if isinstance(inner, Mapping) else ()
    return {name: value for name, value in pairs if isinstance(name, str) and isinstance(value, th.Tensor)}


def is_glide(state: Tensors) -> bool:
    """Whether weights are those of a network of GLIDE."""
    return {"time_embed.0.weight", "transformer_proj.weight", "token_embedding.weight", GLIDE_PLACES} <= set(state)


def read_published(content: Any, path: str) -> Weights | None:
    """The U-Net that the content of a file holds; None where it is of another kind.

    Its flags name the file as the place of the autoencoder if it holds one.

    :raises UserError: where it is of this kind and cannot be used.
    """
    tensors = tensors_in(content)
    if is_glide(tensors):
        return _glide(tensors, path)
    network, averaged = _unet(tensors)
    if not network:
        return _autoencoder(tensors)
    condition, known = _condition(tensors)
    weights, clip = network | condition, any(name.startswith(CLIP) for name in tensors)
    flags = _flags(weights, known, tensors, 512 if clip else 256)
    refuse((not flags, f"{path} holds no whole U-Net of latent-diffusion: fetch it again"))
    if FIRST in tensors:
        flags["autoencoder_path"] = os.path.basename(path)
    kind = "Stable Diffusion 1" if clip else "latent-diffusion"
    others = [printable(str(name)) for name, value in content.items() if not isinstance(value, th.Tensor)]
    others = [name for name in others if name != "state_dict"]
    left = f"; what is no tensor is left out ({listed(others, SHOWN)})"
    place = (AVERAGE if averaged else UNET).rstrip(".")
    return Weights(weights, flags, f"of {path} the weights at {place} are taken: {kind}{left if others else ''}")


def _glide(tensors: Tensors, path: str) -> Weights:
    """A network of GLIDE; its inputs tell an upsampler from one of images, of which one that paints sees more."""
    first, last = tensors.get("input_blocks.0.0.weight"), tensors.get("out.2.weight")
    if first is None or last is None:
        raise UserError(f"{path} holds no whole network of GLIDE: fetch it again")
    channels = len(last) // 2
    enlarges = first.shape[1] in (2 * channels, 3 * channels + 1)
    sizes = {"large_size": 256, "small_size": 64} if enlarges else {"image_size": 64}
    known = {"image_channels": channels, "learn_sigma": True, "noise_schedule": "linear" if enlarges else "cosine"}
    texts = {"context": "text", "text_encoder": GLIDE, "null_text": True, "max_tokens": len(tensors[GLIDE_PLACES])}
    return Weights(dict(tensors), {**sizes, **known, **texts}, "")


def _autoencoder(tensors: Tensors) -> Weights | None:
    """A file of an autoencoder alone, without the networks that only its training had."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "scale_factor")
    state = {name: value for name, value in tensors.items() if name.startswith(parts)}
    return Weights(state, {}, "") if FIRST.removeprefix(FIRST_STAGE) in state else None


def _unet(tensors: Tensors) -> tuple[dict[str, th.Tensor], bool]:
    """The weights of the U-Net, and whether they are its moving average, in whose names there are no dots."""
    network = {name.removeprefix(UNET): value for name, value in tensors.items() if name.startswith(UNET)}
    keys = {name: AVERAGE + f"diffusion_model.{name}".replace(".", "") for name in network}
    if network and all(key in tensors for key in keys.values()):
        return {name: tensors[key] for name, key in keys.items()}, True
    return network, False


def _condition(tensors: Tensors) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """The encoder of labels or texts as a part of the U-Net, and what its shapes do not tell."""
    labels = tensors.get(f"{CONDITION}embedding.weight")
    if labels is not None:
        null = len(labels) == IMAGENET_ROWS
        known: dict[str, Any] = {"num_classes": len(labels) - null, "null_class": null}
        return {"context_encoder.embedding.weight": labels}, known
    texts = {"text_padding": True, "null_text": True}
    if BERT not in tensors:
        return {}, {**texts, "max_tokens": 77}
    names = [name for name in tensors if name.startswith(f"{CONDITION}transformer.") and ".to_logits." not in name]
    return {name.replace(CONDITION, "context_encoder.", 1): tensors[name] for name in names}, texts


def _flags(weights: Tensors, known: Mapping[str, Any], tensors: Tensors, image_size: int) -> dict[str, Any]:
    """The flags of a file; {} where its weights are not those of a whole network."""
    latent = weights["out.2.weight"].shape[0] if "out.2.weight" in weights else 0
    space = _space(tensors, latent)
    shapes = architecture(weights, image_size // space["latent_factor"])
    if "channel_mult" not in shapes:
        return {}
    seen = weights["input_blocks.0.0.weight"].shape[1]
    flags: dict[str, Any] = {
        **shapes,
        **space,
        "image_size": image_size,
        "learn_sigma": False,
        "latent_channels": latent,
    }
    flags |= known if "context" in flags else {}
    if seen > latent:
        flags |= {"cond_type": "image", "cond_channels": seen - latent}
    return flags | _heads(flags, latent) | _schedule(tensors.get("betas"))


def _space(tensors: Tensors, latent: int) -> dict[str, int]:
    """The flags of the autoencoder; where the file has none, those of the published ones."""
    if FIRST not in tensors:
        return {"image_channels": 3, "latent_factor": 8 if latent == 4 else 4}
    begin = f"{FIRST_STAGE}encoder.down."
    levels = {name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)}
    return {"image_channels": tensors[FIRST].shape[1], "latent_factor": 2 ** (len(levels) - 1)}


def _heads(flags: Mapping[str, Any], latent: int) -> dict[str, int]:
    """The heads of the published networks, by what tells these apart."""
    if flags.get("context") == "classes" and latent == 3:
        return {"num_heads": 1}
    if flags.get("context") == "text" or flags.get("resblock_updown"):
        return {"num_heads": 8}
    return {"num_head_channels": 32}


def _schedule(betas: th.Tensor | None) -> dict[str, Any]:
    """The flags of the process: sqrt(beta) is linear in all of these models, between ends of their own."""
    if betas is None:
        return {"noise_schedule": SCHEDULE}
    steps, roots = len(betas), np.sqrt(betas.double().numpy())
    linear = np.allclose(roots, np.linspace(roots[0], roots[-1], steps), rtol=1e-2)
    refuse((not linear, "the betas of the file are of no schedule that is known: their square roots are not linear"))
    first, last = roots[[0, -1]] ** 2 * steps / 1000
    ends = "" if np.allclose((first, last), USUAL_ENDS, rtol=1e-2) else f":{first:.3g},{last:.3g}"
    return {"noise_schedule": SCHEDULE + ends, "diffusion_steps": steps}  # files of 16 bits hold three digits of them
