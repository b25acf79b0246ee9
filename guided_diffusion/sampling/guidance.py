"""cond_fn factories (classifier, loss, CLIP) and wrapper networks (classifier-free guidance, autoguidance).

A cond_fn returns the gradient of a log-probability at the noisy image: (x, timesteps, **model_kwargs) -> [N, C, H, W],
or None where there is no guidance. One with `through_denoiser` is called as (x, t, out, **model_kwargs), with a graph
from x to out["pred_xstart"]. The rules by which a gradient changes a prediction are in prediction.py. All of these work
with every sampler, and together.

Shapes: x is [N, C, H, W], labels y are [N], logits [N, K]; `timesteps` [N] is what the network is fed.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn.functional as F

from ..nn import traits_of
from ..runtime.errors import UserError, check_choice, refuse
from .prediction import CondFn, MeanVariance, sees_denoiser

Scale = float | Callable[[th.Tensor], th.Tensor | float]


def _scale_at(scale: Scale, timesteps: th.Tensor, like: th.Tensor) -> float | th.Tensor | None:
    """The scale at these timesteps, a number or [N, 1, ...]; None where it is 0 for all.

    A number stays one, since to ask a tensor on a GPU what it holds is to wait for it.
    """
    value = scale(timesteps) if callable(scale) else scale
    if not bool(value.isfinite().all() if isinstance(value, th.Tensor) else math.isfinite(value)):
        raise UserError(f"the scale of the guidance is {value}: give a finite number, 0 for none")
    if not isinstance(value, th.Tensor):
        return float(value) or None
    value = value.to(like.device, like.dtype).expand(len(like)).view(-1, *[1] * (like.ndim - 1))
    return value if bool(value.any()) else None


def _downhill(loss: Callable[..., th.Tensor], scale: Scale) -> CondFn:
    """-scale * the gradient of loss(x, timesteps, **model_kwargs), summed over the images, at x alone."""

    def cond_fn(x: th.Tensor, timesteps: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor | None:
        factor = _scale_at(scale, timesteps, x)
        if factor is None:
            return None
        with th.enable_grad():
            x = x.detach().requires_grad_()
            slope = th.autograd.grad(loss(x, timesteps, *args, **kwargs).sum(), x)[0]
        return -factor * slope

    return cond_fn


def classifier_guidance(classifier: Callable[[th.Tensor, th.Tensor], th.Tensor], scale: Scale) -> CondFn:
    """scale * grad log p(y | x_t) of a classifier of noisy images (Dhariwal & Nichol 2021, sec. 4.1).

    :param classifier: (x, timesteps) -> logits [N, K].
    :param scale: 1 is Bayes' rule for an unconditional model; larger trades diversity for fidelity; 0 does not ask the
        classifier. A function of `timesteps` may return a number or one per image.
    """

    def loss(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None, **_: Any) -> th.Tensor:
        if y is None:
            raise UserError('classifier guidance needs labels: give model_kwargs={"y": labels}')
        return F.cross_entropy(classifier(x, timesteps).float(), y.view(-1), reduction="sum")

    return _downhill(loss, scale)


@dataclass(frozen=True)
class ThroughDenoiser:
    """A cond_fn that is called as (x, t, out, **model_kwargs), with a graph from x to out["pred_xstart"]."""

    gradient: CondFn
    through_denoiser = True

    def __call__(self, x: th.Tensor, t: th.Tensor, out: MeanVariance, **kwargs: Any) -> th.Tensor | None:
        return self.gradient(x, t, out, **kwargs)


def _through(slope: Callable[[th.Tensor, MeanVariance], th.Tensor], scale: Scale) -> ThroughDenoiser:
    """-scale * slope(x, out)."""

    def gradient(x: th.Tensor, t: th.Tensor, out: MeanVariance, **_: Any) -> th.Tensor | None:
        factor = _scale_at(scale, out["timesteps"], x)
        return None if factor is None else -factor * slope(x, out)

    return ThroughDenoiser(gradient)


def loss_guidance(loss: Callable[[th.Tensor], th.Tensor], scale: Scale = 1.0) -> ThroughDenoiser:
    """-scale * grad loss(x_0 predicted from x): universal guidance (Bansal et al. 2023), e.g. for inverse problems.

    The loss is taken for -log p(measurement | x_t), so that ddpm goes down its gradient by scale * variance_t. `dps`
    goes by steps that do not depend on the variance.

    :param loss: x_0 [N, C, H, W] in [-1, 1] -> [N], or a number that is summed over the images.
    """
    # the graph stays for others that are combined with this one
    return _through(lambda x, out: th.autograd.grad(loss(out["pred_xstart"]).sum(), x, retain_graph=True)[0], scale)


def dps(residual: Callable[[th.Tensor], th.Tensor], zeta: Scale = 1.0, *, weighting: str = "norm") -> ThroughDenoiser:
    """Diffusion posterior sampling for inverse problems with ddpm (Chung et al. 2023, algorithm 1).

    Every step goes down the gradient of the residual's squared norm by zeta, or by zeta over the norm: the gradient is
    divided by the variance, by which ddpm multiplies it. (With a fixed small variance the last step, which has none, is
    not guided.) For other samplers there is `loss_guidance`.

    :param residual: x_0 [N, C, H, W] in [-1, 1] -> measured - A(x_0), [N, ...].
    :param weighting: "norm", zeta over the norm of the residual, as in the paper's experiments, or "constant".
    """
    check_choice("weighting", weighting, ("norm", "constant"))

    def slope(x: th.Tensor, out: MeanVariance) -> th.Tensor:
        squares = residual(out["pred_xstart"]).flatten(1).square().sum(dim=1)
        gradient = th.autograd.grad(squares.sum(), x, retain_graph=True)[0] / out["log_variance"].exp()
        if weighting == "constant":
            return gradient
        norm = squares.detach().sqrt().clamp(min=th.finfo(squares.dtype).tiny)  # at 0, where the slope is 0
        return gradient / norm.view(-1, *[1] * (x.ndim - 1))

    return _through(slope, zeta)


def combine(*cond_fns: CondFn) -> CondFn:
    """The sum of several gradients, of either kind; None where no cond_fn guides."""

    def total(x: th.Tensor, t: th.Tensor, *out: MeanVariance, **kwargs: Any) -> th.Tensor | None:
        plain = (x.detach(), out[0]["timesteps"]) if out else (x, t)
        gradients = (fn(x, t, *out, **kwargs) if sees_denoiser(fn) else fn(*plain, **kwargs) for fn in cond_fns)
        given = [gradient for gradient in gradients if gradient is not None]
        return sum(given[1:], given[0]) if given else None

    return ThroughDenoiser(total) if any(map(sees_denoiser, cond_fns)) else total


def interval(guide: Callable[..., Any], low: float, high: float) -> Callable[..., Any]:
    """The same guidance, only where low <= timesteps <= high (Kynkaanniemi et al. 2024).

    :param guide: a cond_fn, or a guided network, which elsewhere calls its own unguided one.
    :param low: in what the network is fed: 0 .. T-1 of training, or 0 .. 1000 with rescale_timesteps.
    """
    refuse((not low <= high, f"the interval of guidance from {low} to {high} is empty: give the lower end first"))

    def inside(timesteps: th.Tensor) -> th.Tensor:
        return (timesteps >= low) & (timesteps <= high)

    if isinstance(guide, GuidedNetwork):
        return guide.limited(inside)

    def limited(x: th.Tensor, timesteps: th.Tensor, *rest: Any, **kwargs: Any) -> th.Tensor | None:
        acts = inside(rest[0]["timesteps"] if rest else timesteps)
        gradient = guide(x, timesteps, *rest, **kwargs) if bool(acts.any()) else None
        return None if gradient is None else gradient * acts.view(-1, *[1] * (x.ndim - 1))

    return ThroughDenoiser(limited) if sees_denoiser(guide) else limited


class GuidedNetwork(th.nn.Module, ABC):
    """A network that is moved away from a weaker one: weak + scale * (model - weak); variances are the model's own.

    :param model: (x, timesteps, **model_kwargs) -> [N, C or 2C, H, W]. Where the scale is 1 it is called alone.
    :param rescale: how far the deviation of the result is brought back to that of the model (Lin et al. 2024, eq. 16).
    """

    def __init__(self, model: Callable[..., th.Tensor], scale: Scale, rescale: float = 0.0) -> None:
        super().__init__()
        refuse((not 0 <= rescale <= 1, f"rescale {rescale} is not in 0 .. 1: 0 leaves the result as it is"))
        _scale_at(0.0 if callable(scale) else scale, th.zeros(1), th.zeros(1))
        self.model, self.scale, self.rescale = model, scale, rescale
        traits = traits_of(model)
        self.num_classes, self.null_label = traits.num_classes, traits.null_label

    @abstractmethod
    def weak(self, x: th.Tensor, timesteps: th.Tensor, kwargs: dict[str, Any]) -> th.Tensor:
        """The output of the weaker network."""

    def both(self, x: th.Tensor, timesteps: th.Tensor, kwargs: dict[str, Any]) -> tuple[th.Tensor, th.Tensor]:
        """The outputs of the model and of the weaker network."""
        return self.model(x, timesteps, **kwargs), self.weak(x, timesteps, kwargs)

    def limited(self, inside: Callable[[th.Tensor], th.Tensor]) -> GuidedNetwork:
        """The same guidance where `inside(timesteps)` is true, and the model alone elsewhere."""

        def scale(timesteps: th.Tensor) -> th.Tensor | float:
            acts = inside(timesteps)
            count = int(acts.sum())
            if not count:
                return 1.0
            full = self.scale(timesteps) if callable(self.scale) else self.scale
            if count == len(acts):
                return full
            return th.where(acts, th.as_tensor(full, dtype=th.float32, device=timesteps.device), 1.0)

        other = copy.copy(self)
        other._modules, other.scale = dict(self._modules), scale
        if isinstance(self.model, GuidedNetwork):
            other.model = self.model.limited(inside)
        return other

    def forward(self, x: th.Tensor, timesteps: th.Tensor, **kwargs: Any) -> th.Tensor:
        """The guided output, shaped as the model's."""
        scale = _scale_at(self.scale, timesteps, x)
        if scale is None:
            return self.weak(x, timesteps, kwargs)
        if bool((scale == 1).all()) if isinstance(scale, th.Tensor) else scale == 1:
            return self.model(x, timesteps, **kwargs)
        strong, weak = self.both(x, timesteps, kwargs)
        mean, weak_mean = strong[:, : x.shape[1]], weak[:, : x.shape[1]]
        guided = weak_mean + scale * (mean - weak_mean)
        if self.rescale:
            before, after = (value.flatten(1).std(dim=1, correction=0) for value in (mean, guided))
            factor = (before / after).where(after > 0, 1.0)  # an even image has no contrast to take back
            guided = guided * th.lerp(th.ones_like(factor), factor, self.rescale).view(-1, *[1] * (x.ndim - 1))
        return th.cat([guided, strong[:, x.shape[1] :]], dim=1)


class ClassifierFree(GuidedNetwork):
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional); 1 is the conditional model.

    Both come from one forward pass (Ho & Salimans 2022, eq. 6). (Papers that write (1 + w) * conditional - w *
    unconditional call scale - 1 what is called w.) A conditioning image is replaced by zeros as well, where those mean
    "none" to the network.

    :param null_label: the label that stands for no class; by default that of the network.
    :param null: keywords for the unconditional network, [1, ...] or [N, ...]: {"context": ..., "context_mask": ...} of
        an empty text, or of a negative prompt.
    :raises ValueError: if the network has no unconditional output: it was trained without --class_dropout.
    """

    def __init__(
        self,
        model: Callable[..., th.Tensor],
        scale: Scale,
        *,
        null_label: int | None = None,
        null: Mapping[str, th.Tensor] | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(model, scale, rescale)
        self.null_label = self.null_label if null_label is None else null_label
        traits, self.null = traits_of(model), dict(null or {})
        self.null_cond, self.null_vector = traits.null_cond, traits.null_vector
        conditional = self.null_label is None and not self.null_cond and not self.null_vector and not self.null
        needs = "classifier-free guidance needs a network that was trained without labels too"
        remedy = "give the null_label that it has, or the keywords `null` of an empty text"
        refuse((conditional, f"{needs}: train with class_dropout above 0, or {remedy}"))

    def both(self, x: th.Tensor, timesteps: th.Tensor, kwargs: dict[str, Any]) -> tuple[th.Tensor, th.Tensor]:
        """The model's output with and without its condition."""
        twice, count = dict(kwargs), x.shape[:1]
        for name, value in self._without(kwargs).items():
            if isinstance(value, th.Tensor) and kwargs[name].shape[:1] == count:
                twice[name] = th.cat([kwargs[name], value])
        strong, weak = self.model(th.cat([x, x]), th.cat([timesteps, timesteps]), **twice).chunk(2)
        return strong, weak

    def weak(self, x: th.Tensor, timesteps: th.Tensor, kwargs: dict[str, Any]) -> th.Tensor:
        """The model's output without its condition."""
        return self.model(x, timesteps, **self._without(kwargs))

    def _without(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The same arguments with the null label, the null conditioning image and the keywords of `null`."""
        null: dict[str, float | None] = {"y": self.null_label, "cond_image": 0 if self.null_cond else None}
        null["vector"] = math.nan if self.null_vector else None
        used = {name: value for name, value in null.items() if value is not None}
        for name in [*used, *self.null]:
            if kwargs.get(name) is None:
                words = {"y": "labels", "cond_image": "conditioning images", "vector": "vectors"}.get(name, name)
                raise UserError(f'classifier-free guidance needs {words}: give model_kwargs={{"{name}": {words}}}')
        given = {name: value.to(kwargs[name]).expand_as(kwargs[name]) for name, value in self.null.items()}
        return kwargs | {name: th.full_like(kwargs[name], value) for name, value in used.items()} | given


class Autoguided(GuidedNetwork):
    """Guided by a smaller or less trained version of itself (Karras et al. 2024, eq. 3).

    weaker + scale * (model - weaker): 1 is the model itself, 2 to 3 are usual.

    :param weaker: a network for the same images, timesteps and labels.
    """

    def __init__(self, model: Callable[..., th.Tensor], weaker: Callable[..., th.Tensor], scale: Scale) -> None:
        super().__init__(model, scale)
        self.weaker = weaker

    def weak(self, x: th.Tensor, timesteps: th.Tensor, kwargs: dict[str, Any]) -> th.Tensor:
        """The output of the weaker version."""
        return self.weaker(x, timesteps, **kwargs)


classifier_free, autoguidance = ClassifierFree, Autoguided  # read like the other guidance


def random_cutouts(
    count: int, size: int, *, power: float = 1.0, generator: th.Generator | None = None
) -> Callable[[th.Tensor], th.Tensor]:
    """A function that cuts `count` squares at random from images [N, C, H, W], as [count * N, C, size, size].

    :param power: above 1 prefers small cutouts; their sides lie between `size` and the image's shorter side.
    :param generator: on the CPU; the global one where there is none.
    """

    def cut(images: th.Tensor) -> th.Tensor:
        height, width = images.shape[2:]
        longest, pieces = min(height, width), []
        for share, down, right in th.rand(count, 3, generator=generator).tolist():
            side = round(min(size, longest) + share**power * (longest - min(size, longest)))
            top, left = round(down * (height - side)), round(right * (width - side))
            piece = images[:, :, top : top + side, left : left + side]
            pieces.append(F.interpolate(piece, (size, size), mode="bilinear", antialias=True, align_corners=False))
        return th.cat(pieces)

    return cut


def clip_guidance(
    image_encoder: Callable[[th.Tensor], th.Tensor],
    target: th.Tensor,
    *,
    mode: str = "denoised",
    cutouts: Callable[[th.Tensor], th.Tensor] | None = None,
    scale: Scale = 1.0,
) -> CondFn:
    """-scale * grad of half the squared angle to an embedding, such as CLIP's of a text.

    :param image_encoder: images [N, C, H, W] in [-1, 1] -> embeddings [N, E]; it scales and normalises as it needs.
    :param target: one embedding [E], or several [M, E] to be near to on average.
    :param mode: "noisy" shows x_t itself to an encoder of noisy images (Nichol et al. 2021, GLIDE), "denoised" the
        prediction of x_0, with the gradient through the network.
    :param cutouts: images -> parts of them [K * N, C, S, S], such as `random_cutouts`.
    """
    check_choice("mode", mode, ("noisy", "denoised"))
    targets = F.normalize(target.detach().reshape(-1, target.shape[-1]), dim=-1)

    def loss(images: th.Tensor) -> th.Tensor:
        """Half the squared angle [N], averaged over cutouts and targets."""
        shown = images if cutouts is None else cutouts(images)
        embeddings = F.normalize(image_encoder(shown).float(), dim=-1).unflatten(0, (-1, len(images)))
        chord = (embeddings[:, :, None] - targets.to(embeddings)).norm(dim=-1)
        return (2 * th.arcsin((chord / 2).clamp(max=1 - 1e-6)) ** 2).mean(dim=(0, 2))

    return _downhill(lambda x, *_, **__: loss(x), scale) if mode == "noisy" else loss_guidance(loss, scale)


def without_labels(model: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """An unconditional network that may be called with labels, which only the classifier then sees."""
    return lambda x, timesteps, y=None, **kwargs: model(x, timesteps, **kwargs)


def dynamic_thresholding(percentile: float = 0.995) -> Callable[[th.Tensor], th.Tensor]:
    """A denoised_fn: x_0 clipped to its own `percentile` of |x_0|, where that is above 1, and divided by it.

    (Saharia et al. 2022, sec. 2.3.) Strong guidance then loses contrast instead of saturating.
    """
    outside = not 0 < percentile <= 1
    refuse((outside, f"the percentile {percentile} of dynamic thresholding is not in (0, 1]: usual is 0.995"))

    def threshold(xstart: th.Tensor) -> th.Tensor:
        size = xstart.detach().abs().flatten(1).float()
        limit = size.kthvalue(max(1, math.ceil(percentile * size.shape[1])), dim=1).values.clamp(min=1)
        limit = limit.to(xstart.dtype).view(-1, *[1] * (xstart.ndim - 1))
        return xstart.clamp(-limit, limit) / limit

    return threshold
