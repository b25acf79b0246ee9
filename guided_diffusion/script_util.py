"""The factory: from flags to networks and processes, under the names that scripts and notebooks know.

The keyword sets come from the classes of `config`; the originals' order of parameters is spelled here once, as words.
"""

from __future__ import annotations

import argparse
import functools
import inspect as inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

import numpy as np
import torch as th

from . import dist_util, gaussian_diffusion as gd
from .config import (
    AutoencoderConfig,
    ClassifierConfig,
    ContextConfig,
    DiffusionConfig,
    NetworkConfig,
    SizedConfig,
    SuperResConfig,
    UNetConfig,
    seen_channels,
)
from .networks.autoencoder import AutoencoderKL, VQModel
from .networks.context import context_arguments
from .networks.hardware import fastest_precision
from .respace import SpacedDiffusion, space_timesteps
from .runtime.errors import UserError, refuse
from .runtime.options import Size, check_keywords, defaults, parse_size, size_flag, str2bool as str2bool
from .sampling.schedules import rescale_zero_terminal_snr
from .unet import EncoderUNetModel, SuperResModel, UNetModel

T = TypeVar("T")
NUM_CLASSES = 1000

# channels of each level, by the longer side in pixels from which they serve
CHANNEL_MULT = {1: "1", 8: "1,2", 16: "1,2,2", 32: "1,2,2,2", 64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4"}
CHANNEL_MULT |= {512: "0.5,1,1,2,2,4,4", 1024: "0.5,0.5,1,1,2,2,4,4"}
UPSAMPLER_CHANNEL_MULT = CHANNEL_MULT | {512: "1,1,2,2,4,4"}


def diffusion_defaults() -> dict[str, Any]:
    """Flags of the process and their defaults."""
    return defaults(DiffusionConfig)


def classifier_defaults() -> dict[str, Any]:
    """Flags of the classifier and their defaults."""
    return defaults(ClassifierConfig)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of a diffusion model and their defaults."""
    return defaults(UNetConfig, DiffusionConfig)


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of a classifier with its process and their defaults."""
    return defaults(ClassifierConfig, DiffusionConfig)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of an upsampler and their defaults."""
    return defaults(SuperResConfig, DiffusionConfig)


class ConditionedModel(UNetModel):
    """A U-Net that also sees a conditioning image of the size of its image.

    :param in_channels: C of the images; `cond_channels` more enter the first convolution, behind them.
    :param null_cond: it knows zeros as "no conditioning image", for classifier-free guidance.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        *args: Any,
        cond_channels: int,
        null_cond: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, in_channels + cond_channels, *args, **kwargs)
        self.cond_channels, self.null_cond = cond_channels, null_cond

    def forward(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        y: th.Tensor | None = None,
        *,
        cond_image: th.Tensor | None = None,
        **context: Any,
    ) -> th.Tensor:
        """Predict from noisy images and their conditioning images [N, K, ...] of the same size."""
        shape = (len(x), self.cond_channels, *x.shape[2:])
        if cond_image is None or cond_image.shape != shape:
            given = "none" if cond_image is None else tuple(cond_image.shape)
            raise UserError(f"the network needs conditioning images: cond_image must be of shape {shape}, got {given}")
        return super().forward(th.cat([x, cond_image.to(x.dtype)], dim=1), timesteps, y, **context)


def channel_multipliers(text: str, size: tuple[int, int], table: Mapping[int, str] = CHANNEL_MULT) -> tuple[float, ...]:
    """Channels of each level over the first width, from the flag or by the size, whose sides they must divide."""
    text = text or table[max(key for key in table if key <= max(size))]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    none = min(numbers, default=0) <= 0
    refuse((none, f"channel_mult {text!r} is not a list of positive numbers: write for example 0.5,1,2"))
    levels, rate = len(numbers), 2 ** (len(numbers) - 1)
    for side in size:
        if side % rate:
            fault = f"image size {side} is not a multiple of {rate}, as the {levels} levels of channel_mult {text} need"
            raise UserError(f"{fault}: use {_multiples(side, rate)}, or fewer levels")
    return tuple(int(number) if number.is_integer() else number for number in numbers)


def _multiples(side: int, rate: int) -> str:
    """Those of a rate below and above a side."""
    return " or ".join(str(legal) for legal in (side // rate * rate, (side // rate + 1) * rate) if legal)


def attention_rates(
    text: str, size: tuple[int, int], levels: int, name: str = "attention_resolutions"
) -> tuple[int, ...]:
    """Downsample factors at which there is attention, from resolutions in pixels of the longer side."""
    words = [word for word in text.split(",") if word.strip()]
    sound = all(word.strip().isdigit() and int(word) for word in words)
    refuse((not sound, f"{name} {text!r} is not a list of resolutions: write for example 32,16,8, or '' for none"))
    longer = max(size)
    rates = {int(word): longer // int(word) for word in words}
    existing = {2**level: str(longer // 2**level) for level in range(levels)}
    lost = [str(resolution) for resolution, rate in rates.items() if rate not in existing]
    message = f"{name} {', '.join(lost)} of {text!r} do not occur at size {longer}"
    nothing = lost and len(lost) == len(rates)
    refuse((nothing, f"{message}: its levels are {', '.join(existing.values())}; use these, or '' for none"))
    if lost:
        warnings.warn(f"{message} and have no effect", stacklevel=3)
    return tuple(rates.values())


def _side(size: tuple[int, int]) -> int | tuple[int, int]:
    return size if size[0] != size[1] else size[0]


def _network_arguments(
    config: NetworkConfig, size: Size, learn_sigma: bool, table: Mapping[int, str]
) -> dict[str, Any]:
    """Arguments of `UNetModel` and `SuperResModel`: the flags of the same names, and what others become."""
    sides = parse_size(size)
    multipliers = channel_multipliers(config.channel_mult, sides, table)
    names = signature(UNetModel).parameters.keys() - defaults(ContextConfig).keys()
    same = {name: value for name, value in asdict(config).items() if name in names}
    return same | {
        "image_size": _side(sides),
        "in_channels": config.image_channels,
        "model_channels": config.num_channels,
        "out_channels": config.image_channels * (2 if learn_sigma else 1),
        "attention_resolutions": attention_rates(config.attention_resolutions, sides, len(multipliers)),
        "channel_mult": multipliers,
        "num_classes": config.num_classes if config.class_cond else None,
        **context_arguments(config, class_cond=config.class_cond),
    }


def in_its_space(config: T) -> T:
    """The config of a network with the size and the channels of what it works on: latents, where it does."""
    if not isinstance(config, SizedConfig) or not config.latent_channels:
        return config
    (height, width), factor = parse_size(config.image_size), config.latent_factor
    for side in (height, width):
        if side % factor:
            fault = f"image size {side} is not a multiple of {factor}, as the autoencoder needs"
            raise UserError(f"{fault}: use {_multiples(side, factor)}")
    size, channels = size_flag((height // factor, width // factor)), config.latent_channels
    return replace(config, image_size=size, image_channels=channels, latent_factor=1, latent_channels=0)


def build_unet(config: UNetConfig, learn_sigma: bool) -> UNetModel:
    """The U-Net of a config, in float32."""
    config = in_its_space(config)
    network = _network_arguments(config, config.image_size, learn_sigma, CHANNEL_MULT)
    seen = seen_channels(config.cond_type, config.cond_channels, config.image_channels)
    return ConditionedModel(**network, cond_channels=seen, null_cond=config.null_cond) if seen else UNetModel(**network)


def build_upsampler(config: SuperResConfig, learn_sigma: bool) -> SuperResModel:
    """The upsampler of a config, in float32."""
    network = _network_arguments(config, config.large_size, learn_sigma, UPSAMPLER_CHANNEL_MULT)
    return SuperResModel(**network, cond_aug=config.cond_aug > 0)


def build_classifier(config: ClassifierConfig) -> EncoderUNetModel:
    """The classifier of a config, in float32."""
    config = in_its_space(config)
    size = parse_size(config.image_size)
    multipliers = channel_multipliers(config.classifier_channel_mult, size)
    resolutions = config.classifier_attention_resolutions
    return EncoderUNetModel(
        image_size=_side(size),
        in_channels=config.image_channels,
        model_channels=config.classifier_width,
        out_channels=config.num_classes,
        num_res_blocks=config.classifier_depth,
        attention_resolutions=attention_rates(resolutions, size, len(multipliers), "classifier_attention_resolutions"),
        channel_mult=multipliers,
        dims=config.dims,
        use_fp16=config.classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=config.classifier_use_scale_shift_norm,
        resblock_updown=config.classifier_resblock_updown,
        pool=config.classifier_pool,
        norm_groups=config.classifier_norm_groups,
    )


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL | VQModel:
    """The autoencoder of a config, in float32."""
    size = parse_size(config.image_size)
    multipliers = channel_multipliers(config.ch_mult, size)
    rates = attention_rates(config.attn_resolutions, size, len(multipliers), "attn_resolutions")
    if not all(isinstance(number, int) for number in multipliers):
        raise UserError(f"ch_mult {config.ch_mult!r} must be whole numbers, such as 1,2,4: change --ch as well")
    ddconfig = {
        **{name: getattr(config, name) for name in ("ch", "num_res_blocks", "z_channels", "dropout", "norm_groups")},
        "ch_mult": list(multipliers),
        "attn_resolutions": [max(size) // rate for rate in rates],
        "resolution": max(size),
        "in_channels": config.image_channels,
        "out_ch": config.image_channels,
        "double_z": config.kind == "kl",
    }
    if config.kind == "vq":
        return VQModel(ddconfig, config.n_embed, config.embed_dim)
    return AutoencoderKL(ddconfig, config.embed_dim)


def build_network(config: UNetConfig | SuperResConfig | ClassifierConfig, learn_sigma: bool) -> Any:
    """The network of a config, in float32, without a text encoder; `learn_sigma` changes nothing of a classifier."""
    if isinstance(config, ClassifierConfig):
        return build_classifier(config)
    if isinstance(config, SuperResConfig):
        return build_upsampler(config, learn_sigma)
    return build_unet(config, learn_sigma)


def build_diffusion(config: DiffusionConfig) -> SpacedDiffusion:
    """The process of a config."""
    flags = asdict(config)
    return create_gaussian_diffusion(steps=flags.pop("diffusion_steps"), **flags)


def _surface(order: str, *sections: type[Any], **own_defaults: Any) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a function of the values of flags the parameters `order`, then all other flags of `sections` by keyword.

    Parameters have the defaults in `own_defaults`, else none; flags by keyword have those of their config class. A
    keyword that the function does not know is a TypeError that names the nearest one.
    """
    words = order.split()
    first = [Parameter(w, Parameter.POSITIONAL_OR_KEYWORD, default=own_defaults.get(w, Parameter.empty)) for w in words]
    more = {name: value for name, value in defaults(*sections).items() if name not in words}
    rest = [Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in more.items()]
    surface = Signature([*first, *rest])

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(build)
        def create(*args: Any, **kwargs: Any) -> T:
            check_keywords(kwargs, surface.parameters, build.__name__)
            bound = surface.bind(*args, **kwargs)
            bound.apply_defaults()
            return build(bound.arguments)

        create.__signature__ = surface  # type: ignore[attr-defined]
        return create

    return decorate


def _network(section: type[Any], flags: Mapping[str, Any]) -> Any:
    """A network in the precision asked for by name; "auto" is that of the device of `dist_util.dev`."""
    config = section(**{name: flags[name] for name in defaults(section)})
    model = build_network(config, flags.get("learn_sigma", False))
    precision = flags["classifier_precision" if section is ClassifierConfig else "precision"]
    if precision == "auto":
        precision = fastest_precision(dist_util.dev(), model.model_channels).precision
    if precision:
        model.convert_to(precision)
    return model


def _both(section: type[Any], flags: Mapping[str, Any]) -> tuple[Any, SpacedDiffusion]:
    process = DiffusionConfig(**{name: flags[name] for name in defaults(DiffusionConfig)})
    return _network(section, flags), build_diffusion(process)


_HEADS = "num_heads num_head_channels num_heads_upsample"
_DIFFUSION = (
    "diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas"
)
_CLASSIFIER = (
    "image_size classifier_use_fp16 classifier_width classifier_depth classifier_attention_resolutions "
    "classifier_use_scale_shift_norm classifier_resblock_updown classifier_pool"
)
_FALSE = (
    "learn_sigma class_cond use_checkpoint use_scale_shift_norm resblock_updown use_fp16 use_new_attention_order "
    "use_neighborhood_attention"
)
_DEFAULTS = {**dict.fromkeys(_FALSE.split(), False), "channel_mult": "", "attention_resolutions": "16", "dropout": 0}
_HEAD_DEFAULTS = {"num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1}


@_surface(
    f"image_size class_cond learn_sigma num_channels num_res_blocks channel_mult {_HEADS} attention_resolutions "
    f"dropout {_DIFFUSION} use_checkpoint use_scale_shift_norm resblock_updown use_fp16 use_new_attention_order "
    "use_neighborhood_attention",
    UNetConfig,
    DiffusionConfig,
    use_neighborhood_attention=False,
)
def create_model_and_diffusion(flags: dict[str, Any]) -> tuple[UNetModel, SpacedDiffusion]:
    """A U-Net and its process from the flags of `model_and_diffusion_defaults`."""
    return _both(UNetConfig, flags)


@_surface(
    "image_size num_channels num_res_blocks channel_mult learn_sigma class_cond use_checkpoint attention_resolutions "
    f"{_HEADS} use_scale_shift_norm dropout resblock_updown use_fp16 use_new_attention_order "
    "use_neighborhood_attention",
    UNetConfig,
    **_DEFAULTS,
    **_HEAD_DEFAULTS,
)
def create_model(flags: dict[str, Any]) -> UNetModel:
    """A U-Net from its flags; its defaults are the originals' and not those of the scripts."""
    model: UNetModel = _network(UNetConfig, flags)
    return model


@_surface(f"{_CLASSIFIER} learn_sigma {_DIFFUSION}", ClassifierConfig, DiffusionConfig)
def create_classifier_and_diffusion(flags: dict[str, Any]) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A classifier and its process from the flags of `classifier_and_diffusion_defaults`."""
    return _both(ClassifierConfig, flags)


@_surface(_CLASSIFIER, ClassifierConfig)
def create_classifier(flags: dict[str, Any]) -> EncoderUNetModel:
    """A classifier from the flags of `classifier_defaults`."""
    model: EncoderUNetModel = _network(ClassifierConfig, flags)
    return model


@_surface(
    f"large_size small_size class_cond learn_sigma num_channels num_res_blocks {_HEADS} attention_resolutions "
    f"dropout {_DIFFUSION} use_checkpoint use_scale_shift_norm resblock_updown use_fp16",
    SuperResConfig,
    DiffusionConfig,
)
def sr_create_model_and_diffusion(flags: dict[str, Any]) -> tuple[SuperResModel, SpacedDiffusion]:
    """An upsampler and its process from the flags of `sr_model_and_diffusion_defaults`."""
    return _both(SuperResConfig, flags)


@_surface(
    "large_size small_size num_channels num_res_blocks learn_sigma class_cond use_checkpoint attention_resolutions "
    f"{_HEADS} use_scale_shift_norm dropout resblock_updown use_fp16",
    SuperResConfig,
)
def sr_create_model(flags: dict[str, Any]) -> SuperResModel:
    """An upsampler from its flags."""
    model: SuperResModel = _network(SuperResConfig, flags)
    return model


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[float] = "",
    predict_v: bool = False,
    zero_terminal_snr: bool = False,
    loss_weight: str = "",
    min_snr_gamma: float = 5.0,
) -> SpacedDiffusion:
    """A process from its flags; without `timestep_respacing` it takes all its steps."""
    both = predict_v and predict_xstart
    refuse((both, "predict_v and predict_xstart are both True, and the network predicts one of the two: give one"))
    loss = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    mean = gd.ModelMeanType.VELOCITY if predict_v else gd.ModelMeanType.EPSILON
    betas = gd.get_named_beta_schedule(noise_schedule, steps)
    betas = rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas
    return SpacedDiffusion(
        space_timesteps(steps, timestep_respacing or [steps], alphas_cumprod=np.cumprod(1 - betas)),
        betas=betas,
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else mean,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=gd.LossType.RESCALED_KL if use_kl else loss,
        rescale_timesteps=rescale_timesteps,
        loss_weight=loss_weight,
        min_snr_gamma=min_snr_gamma,
    )


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add a flag for every entry: help from the flag table where the name is known, the type from the value."""
    sections = (UNetConfig, ClassifierConfig, SuperResConfig, DiffusionConfig)
    table = {spec.name: spec.metadata for section in sections for spec in fields(section)}
    for name, value in default_dict.items():
        known: Mapping[str, Any] = table.get(name, {})
        kind = str2bool if isinstance(value, bool) else str if value is None else type(value)
        about = known.get("help", "").replace("%", "%%")
        parser.add_argument(f"--{name}", default=value, type=known.get("convert") or kind, help=about)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The named values of a parsed command line; flags that the originals do not have may be missing from it."""
    keys = list(keys)
    functions = create_model_and_diffusion, sr_create_model_and_diffusion, create_classifier_and_diffusion
    surfaces = [signature(function).parameters for function in functions]
    closest = max(surfaces, key=lambda parameters: len(parameters.keys() & set(keys)))
    added = {name: parameter.default for name, parameter in closest.items() if parameter.default is not parameter.empty}
    return {key: added[key] if key in added and not hasattr(args, key) else getattr(args, key) for key in keys}
