"""Folders of the library diffusers: its UNet2DModel and AutoencoderKL as weights and flags of this package, and back.

A folder holds config.json and diffusion_pytorch_model.safetensors. Both networks compute what ours do where the config
is one that `_unet_config` or `_autoencoder_config` writes: modules have other names and numbers, attention has matrices
in place of convolutions of one position, and q, k and v lie apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch as th

from ..networks.architecture import Weights, architecture
from ..networks.autoencoder import NORM_GROUPS, AutoencoderKL, VQModel
from ..nn import GROUPS
from ..runtime import files
from ..runtime.errors import DAMAGE, WHY, UserError, as_user_error, listed, printable, refuse
from ..runtime.options import parse_size, size_flag

CONFIG, FILE = "config.json", "diffusion_pytorch_model.safetensors"
UNET, AUTOENCODER = "UNet2DModel", "AutoencoderKL"
QKV = "to_q", "to_k", "to_v"
ANY_SIZE = 2**20  # pixels, where they are not known: attention_resolutions are parts of it
Config = dict[str, Any]
State = Mapping[str, th.Tensor]

# modules outside the levels, and layers within modules: ours -> theirs
UNET_ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
UNET_ENDS |= {"label_emb": "class_embedding", "input_blocks.0.0": "conv_in"}
UNET_ENDS |= {
    f"middle_block.{index}": f"mid_block.{name}.{index // 2}"
    for index, name in enumerate(("resnets", "attentions", "resnets"))
}
UNET_ENDS |= {"out.0": "conv_norm_out", "out.2": "conv_out"}
UNET_PARTS = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
UNET_PARTS |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut", **{name: name for name in QKV}}
HALF_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
HALF_ENDS |= {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"}
HALF_ENDS |= {"mid.attn_1": "mid_block.attentions.0"}
HALF_PARTS = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "nin_shortcut": "conv_shortcut"}
HALF_PARTS |= dict(zip("qkv", QKV, strict=True))
ATTENTION_PARTS = {"norm": "group_norm", "proj_out": "to_out.0"}
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names in older files of theirs

# what their networks can be and ours are not; these values are also theirs where a config has none
FIXED: Config = {"act_fn": "silu"}
FIXED_UNET = FIXED | {"center_input_sample": False, "time_embedding_type": "positional", "time_embedding_dim": None}
FIXED_UNET |= {"freq_shift": 0, "flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D", "norm_eps": 1e-5}
FIXED_UNET |= {"mid_block_scale_factor": 1, "add_attention": True, "downsample_padding": 1, "class_embed_type": None}
FIXED_AUTOENCODER = FIXED | {"shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True}
FIXED_AUTOENCODER |= {"use_post_quant_conv": True, "mid_block_add_attention": True}
NEVER: Config = {"dims": 2, "num_heads_upsample": -1, "use_neighborhood_attention": False, "null_class": False}
NEVER |= {"cond_type": "", "cond_channels": 0, "null_cond": False}  # flags that their networks have no word for
UNET_DEFAULTS: Config = {"sample_size": 64, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "dropout": 0.0}
UNET_DEFAULTS |= {
    "norm_num_groups": GROUPS,
    "attention_head_dim": 8,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
}
UNET_DEFAULTS |= {"downsample_type": "conv", "upsample_type": "conv", "attn_norm_num_groups": None}
AUTOENCODER_DEFAULTS: Config = {"in_channels": 3, "out_channels": 3, "layers_per_block": 1, "latent_channels": 4}
AUTOENCODER_DEFAULTS |= {"norm_num_groups": GROUPS, "sample_size": 32, "scaling_factor": 0.18215}

SCHEDULER_DEFAULTS: Config = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
}
SCHEDULER_DEFAULTS |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def _unet_modules(config: Config) -> Iterator[tuple[str, str]]:
    """Our modules and theirs; no network has all, as the resolution changes by residual blocks or by convolutions."""
    yield from UNET_ENDS.items()
    blocks, attends = config["layers_per_block"], ["Attn" in kind for kind in config["down_block_types"]]
    for level in range(len(attends)):
        first = 1 + level * (blocks + 1)
        for block in range(blocks):
            yield f"input_blocks.{first + block}.0", f"down_blocks.{level}.resnets.{block}"
            yield f"input_blocks.{first + block}.1", f"down_blocks.{level}.attentions.{block}"
        yield f"input_blocks.{first + blocks}.0", f"down_blocks.{level}.downsamplers.0"
        yield f"input_blocks.{first + blocks}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    for level, attending in enumerate(reversed(attends)):
        first = level * (blocks + 1)
        for block in range(blocks + 1):
            yield f"output_blocks.{first + block}.0", f"up_blocks.{level}.resnets.{block}"
            if attending:
                yield f"output_blocks.{first + block}.1", f"up_blocks.{level}.attentions.{block}"
        yield f"output_blocks.{first + blocks}.{1 + attending}", f"up_blocks.{level}.upsamplers.0"
        yield f"output_blocks.{first + blocks}.{1 + attending}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def _autoencoder_modules(config: Config) -> Iterator[tuple[str, str]]:
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    levels = len(config["block_out_channels"])
    for half, way, more in (("encoder", "down", 0), ("decoder", "up", 1)):
        yield from ((f"{half}.{ours}", f"{half}.{theirs}") for ours, theirs in HALF_ENDS.items())
        for level in range(levels):  # ours counts those of the decoder from the finest one
            ours = f"{half}.{way}.{levels - 1 - level if more else level}"
            theirs = f"{half}.{way}_blocks.{level}"
            yield f"{ours}.{way}sample.conv", f"{theirs}.{way}samplers.0.conv"
            for block in range(config["layers_per_block"] + more):
                yield f"{ours}.block.{block}", f"{theirs}.resnets.{block}"
                yield f"{ours}.attn.{block}", f"{theirs}.attentions.{block}"


def _names(config: Config) -> dict[str, str]:
    """Our parameters -> theirs."""
    unet = config["_class_name"] == UNET
    modules, parts = (_unet_modules(config), UNET_PARTS) if unet else (_autoencoder_modules(config), HALF_PARTS)
    layers = {"": "", **{f".{ours}": f".{theirs}" for ours, theirs in {**ATTENTION_PARTS, **parts}.items()}}
    pairs = [(ours + layer, theirs + other) for ours, theirs in modules for layer, other in layers.items()]
    return {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in pairs for end in ("weight", "bias")}


def _renamed(state: State, names: Mapping[str, str], path: str, axes: int) -> dict[str, th.Tensor]:
    """The same weights by other names.

    :param axes: of space of the convolutions that attention has in the result; 0: it has matrices.
    """
    unknown = [printable(name) for name in state if name not in names]
    refuse((unknown, f"{path} holds {len(unknown)} tensors of another network, {listed(unknown, 1)}"))
    flat = {name: ".attentions." in f"{name} {names[name]}" and value.ndim > 1 for name, value in state.items()}
    return {
        names[name]: value.flatten(1)[(..., *[None] * axes)] if flat[name] else value for name, value in state.items()
    }


def _unet_config(flags: Mapping[str, Any]) -> Config:
    """Their config of a network with flags of ours; num_head_channels -1 is one head in each attention."""
    size, first = parse_size(flags["image_size"]), flags["num_channels"]
    widths = [int(float(mult) * first) for mult in flags["channel_mult"].split(",")]
    rates = [max(size) // int(part) for part in flags["attention_resolutions"].split(",") if part]
    groups = flags.get(NORM_GROUPS, GROUPS)
    attends, updown = [2**level in rates for level in range(len(widths))], flags.get("resblock_updown", False)
    kinds = [f"Resnet{way}sampleBlock2D" if updown else f"{way}Block2D" for way in ("Down", "Up")]
    down, up = (
        [f"Attn{way}Block2D" if has else kind for has in attends]
        for way, kind in zip(("Down", "Up"), kinds, strict=True)
    )
    return {
        "_class_name": UNET,
        "sample_size": None if ANY_SIZE in size else size[0] if size[0] == size[1] else list(size),
        "in_channels": flags["image_channels"],
        "out_channels": flags["image_channels"] * (1 + flags["learn_sigma"]),
        "block_out_channels": widths,
        "layers_per_block": flags["num_res_blocks"],
        "down_block_types": down,
        "up_block_types": up[::-1],
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if flags["use_scale_shift_norm"] else None,  # without it the middle has no norm
        "attention_head_dim": None if flags["num_head_channels"] == -1 else flags["num_head_channels"],
        "num_class_embeds": flags["num_classes"] if flags["class_cond"] else None,
        "dropout": flags.get("dropout", 0.0),
        **FIXED_UNET,
    }


def _unet_flags(config: Config) -> dict[str, Any]:
    widths, size = config["block_out_channels"], config["sample_size"]
    attends = ["Attn" in kind for kind in config["down_block_types"]]
    rates = [2**level for level, attending in enumerate(attends) if attending]
    kinds = {"ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * (config["downsample_type"] == "resnet")}
    return {
        "image_size": size_flag(size),
        "image_channels": config["in_channels"],
        "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
        "num_channels": widths[0],
        "channel_mult": ",".join(f"{width / widths[0]:.12g}" for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": ",".join(str(max(parse_size(size)) // rate) for rate in rates),
        "num_heads": 1,
        "num_head_channels": config["attention_head_dim"] or -1,
        "use_new_attention_order": True,
        NORM_GROUPS: config["norm_num_groups"],
        "resblock_updown": bool(kinds & set(config["down_block_types"])),
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "dropout": config["dropout"],
        "class_cond": config["num_class_embeds"] is not None,
        "num_classes": config["num_class_embeds"] or 1000,
    }


def write_unet(state: State, flags: Mapping[str, Any], size: Any, path: str) -> tuple[Config, dict[str, th.Tensor]]:
    """The config and the weights of a UNet2DModel that computes what a U-Net of ours does.

    :param flags: of its run: they tell the heads, which weights do not show.
    :param size: of what it works on, 0 where that is not known.
    :raises UserError: naming the flag of a network that theirs cannot be.
    """
    read, unlike = architecture(state, size or ANY_SIZE), f"{path} cannot become a {UNET}, which has no"
    partial = not {"channel_mult", "learn_sigma"} <= set(read)
    only = "only these can be written to a folder of diffusers"
    refuse((partial, f"{path} holds no whole U-Net and no autoencoder: {only}"))
    first = float(read["channel_mult"].split(",")[0])
    seen = {state["input_blocks.0.0.weight"].shape[1], len(state["out.2.bias"]) // (1 + read["learn_sigma"])}
    refuse(
        (read["dims"] != 2, f"{unlike} --dims {read['dims']}"),
        (first != 1, f"{unlike} --channel_mult that begins with {first:g}"),
        (flags.get("context", "none") != "none" or "context" in read, f"{unlike} --context"),
        (flags.get("use_neighborhood_attention"), f"{unlike} --use_neighborhood_attention"),
        (seen != {read["image_channels"]}, f"{unlike} --large_size or --cond_type: it sees no second image"),
    )
    known = {**flags, **read, "image_size": size or ANY_SIZE, "num_heads": flags.get("num_heads")}
    config = _unet_config(known | {"num_head_channels": _head_size(known, state, path)})
    parts, newer = dict[str, th.Tensor](), flags.get("use_new_attention_order", False)
    for name, value in state.items():
        stem, joined, end = name.partition(".qkv.")
        if joined:
            rows = value.unflatten(0, (3, -1)) if newer else _by_head(value, config)
            parts |= {f"{stem}.{part}.{end}": row for part, row in zip(QKV, rows, strict=True)}
        else:
            parts[name] = value
    return config, _renamed(parts, _names(config), path, 0)


def _by_head(value: th.Tensor, config: Config) -> th.Tensor:
    """[3, C, ...] of the originals' first order of q, k and v, in which heads come first."""
    heads: int = len(value) // 3 // (config["attention_head_dim"] or len(value) // 3)
    rows: th.Tensor = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    return rows


def _head_size(flags: Mapping[str, Any], state: State, path: str) -> int:
    """Channels of every head, -1 for one head in each attention."""
    size, heads = int(flags.get("num_head_channels", -1)), flags["num_heads"]
    if size != -1:
        return size
    example = '{"flags": {"num_head_channels": 64, "use_new_attention_order": true}}'
    remedy = f"write config.json beside it, such as {example}"
    refuse((heads is None, f"the weights of {path} do not show their heads: {remedy}"))
    sizes = sorted({len(value) // 3 // heads for name, value in state.items() if name.endswith(".qkv.bias")})
    if heads == 1 or (len(sizes) == 1 and flags.get("num_heads_upsample", -1) in (-1, heads)):
        return -1 if heads == 1 else sizes[0]
    raise UserError(
        f"{path} cannot become a {UNET}, whose heads are all of one size, and --num_heads {heads} makes some of "
        f"{' and '.join(map(str, sizes))} channels: train with --num_head_channels for that"
    )


def read_unet(state: State, path: str) -> Weights | None:
    """The U-Net in a file of theirs, with the flags that its config tells; None for files of other kinds."""
    if "mid_block.resnets.0.conv1.weight" not in state:
        return None
    config = _config_beside(path, UNET, UNET_DEFAULTS)
    flags = _told(config, path, _unet_flags, _unet_config)
    newer = _saved(path).get("use_new_attention_order", True)  # it was written here
    parts = _renamed(_by_newer_names(state), _inverse(_names(config)), path, 1)
    network = {name: value for name, value in parts.items() if not re.search(r"\.to_[qkv]\.", name)}
    for stem, _, end in (name.partition(".to_q.") for name in parts if ".to_q." in name):
        with as_user_error(f"{path} holds no whole attention, of {stem}: fetch it again", LookupError, RuntimeError):
            rows = [parts[f"{stem}.{part}.{end}"] for part in QKV]
            heads = 1 if newer else len(rows[0]) // (config["attention_head_dim"] or len(rows[0]))
            network[f"{stem}.qkv.{end}"] = th.stack(rows).unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 2)
    known = NEVER | _process_beside(path) | flags | {"use_new_attention_order": newer}
    return Weights(network, known, f"of {path} the {UNET} is taken")


def _process_beside(path: str) -> dict[str, Any]:
    """The flags of the process that the scheduler of a network's pipeline tells; {} without one."""
    place = files.join(os.path.dirname(os.path.dirname(os.path.abspath(path))), "scheduler", "scheduler_config.json")
    if not files.exists(place):
        return {}
    with as_user_error(f"{place} is no config of a scheduler ({WHY}): fetch it again, or remove it", *DAMAGE):
        values = {**SCHEDULER_DEFAULTS, **files.parse_json(files.read_file(place))}
        steps = values["num_train_timesteps"]
        ends = ",".join(f"{values[end] * steps / 1000:g}" for end in ("beta_start", "beta_end"))
        names = {"squaredcos_cap_v2": "cosine", "scaled_linear": f"scaled_linear:{ends}"}
        kind = values["beta_schedule"]
        names |= {"linear": "linear"} if ends == "0.0001,0.02" else {}
        schedule = names.get(kind, "")
    unlike = f"{place} has the betas {printable(str(kind))} from {ends}, which --noise_schedule has not"
    refuse((not schedule or values.get("trained_betas"), unlike))
    predicts = values["prediction_type"]
    known = {"noise_schedule": schedule, "diffusion_steps": steps, "predict_v": predicts == "v_prediction"}
    return known | {"predict_xstart": predicts == "sample", "zero_terminal_snr": values["rescale_betas_zero_snr"]}


def _autoencoder_config(shapes: Mapping[str, Any], scale_factor: float) -> Config:
    """Their config of an autoencoder with the arguments `ddconfig` of ours."""
    attends = [
        shapes["resolution"] // 2**level in shapes["attn_resolutions"] for level in range(len(shapes["ch_mult"]))
    ]
    return {
        "_class_name": AUTOENCODER,
        "sample_size": shapes["resolution"],
        "in_channels": shapes["in_channels"],
        "out_channels": shapes["out_ch"],
        "block_out_channels": [shapes["ch"] * mult for mult in shapes["ch_mult"]],
        "layers_per_block": shapes["num_res_blocks"],
        "down_block_types": ["Attn" * attending + "DownEncoderBlock2D" for attending in attends],
        "up_block_types": ["Attn" * attending + "UpDecoderBlock2D" for attending in reversed(attends)],
        "latent_channels": shapes["z_channels"],
        "scaling_factor": scale_factor,
        "norm_num_groups": shapes.get(NORM_GROUPS, GROUPS),
        **FIXED_AUTOENCODER,
    }


def _autoencoder_shapes(config: Config) -> dict[str, Any]:
    widths, size = config["block_out_channels"], max(parse_size(config["sample_size"]))
    attends = [size // 2**level for level, kind in enumerate(config["down_block_types"]) if kind.startswith("Attn")]
    names = {"resolution": size, "in_channels": config["in_channels"], "out_ch": config["out_channels"]}
    names |= {"ch": widths[0], "ch_mult": [width // widths[0] for width in widths], "attn_resolutions": attends}
    names |= {"num_res_blocks": config["layers_per_block"], NORM_GROUPS: config["norm_num_groups"]}
    return names | {"z_channels": config["latent_channels"]}


def write_autoencoder(
    network: AutoencoderKL | VQModel, scale_factor: float, path: str
) -> tuple[Config, dict[str, th.Tensor]]:
    """The config and the weights of an AutoencoderKL that computes what one of ours does.

    :param scale_factor: what its latents are multiplied by in diffusion.
    """
    unlike, shapes = f"{path} cannot become an {AUTOENCODER}, which has no", network.ddconfig
    mult, width, latent = shapes["ch_mult"][0], shapes["z_channels"], network.embed_dim
    refuse(
        (not isinstance(network, AutoencoderKL), f"{unlike} --kind vq"),
        (mult != 1, f"{unlike} --ch_mult that begins with {mult}"),
        (latent != width, f"{unlike} --embed_dim {latent} beside --z_channels {width}"),
    )
    config = _autoencoder_config(shapes, scale_factor)
    weights = {name: value for name, value in network.state_dict().items() if name != NORM_GROUPS}
    return config, _renamed(weights, _names(config), path, 0)


def read_autoencoder(state: State, path: str) -> dict[str, th.Tensor]:
    """The weights of an AutoencoderKL of theirs by our names, with its factor as `scale_factor`; others as they are."""
    if "encoder.mid_block.resnets.0.conv1.weight" not in state:
        return dict(state)
    config = _config_beside(path, AUTOENCODER, AUTOENCODER_DEFAULTS)
    factor = config["scaling_factor"]
    _told(config, path, _autoencoder_shapes, lambda shapes: _autoencoder_config(shapes, factor))
    network = _renamed(_by_newer_names(state), _inverse(_names(config)), path, 2)
    groups = {} if (number := config["norm_num_groups"]) == GROUPS else {NORM_GROUPS: th.tensor(float(number))}
    return {**network, **groups, "scale_factor": th.tensor(factor)}


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _by_newer_names(state: State) -> dict[str, th.Tensor]:
    older = re.compile(rf"(?<=\.attentions\.\d\.)({'|'.join(OLDER)})(?=\.)")
    return {older.sub(lambda match: OLDER[match[1]], name): value for name, value in state.items()}


def _saved(path: str) -> dict[str, Any]:
    """The flags in the header of a file that was written here."""
    text = files.safetensors_header(path).get(CONFIG)
    return dict(files.parse_json(text)["flags"]) if text else {}


def _config_beside(path: str, kind: str, defaults: Mapping[str, Any]) -> Config:
    """The config of a file, with their defaults for what it leaves out."""
    place = files.join(os.path.dirname(path) or ".", CONFIG)
    with as_user_error(f"{path} needs the config.json of its {kind} beside it, and {place} is none ({WHY})", *DAMAGE):
        config = {**defaults, **files.parse_json(files.read_file(place))}
        refuse((config["_class_name"] != kind, f"it is of a {printable(str(config['_class_name']))}"))
        return config | {"sample_size": config["sample_size"] or defaults["sample_size"]}


def _told(config: Config, path: str, read: Any, write: Any) -> Any:
    """What a config of theirs tells, or a UserError where no network of ours is that."""
    with as_user_error(f"the config.json of {path} is damaged ({WHY}): fetch it again", *DAMAGE, ArithmeticError):
        told = read(config)
        ours = write(told)
    theirs = {**ours, **config}  # what it leaves out has the value that is fixed here
    unlike = [f"{name} {theirs[name]!r} in place of {value!r}" for name, value in ours.items() if theirs[name] != value]
    which = f"{path} is a {config['_class_name']} that no network here computes"
    refuse((unlike, f"{which}: it has {''.join(map(printable, unlike[:1]))}"))
    return told
