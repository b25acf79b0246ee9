"""Data whose best denoiser is known exactly: mixtures of Gaussians, each component of which belongs to a class.

What a perfectly trained network and a perfectly trained classifier would answer is then known in closed form at every
noise level, so that whatever a sampler gets wrong is the sampler's own. Noise is the same in every orthonormal basis:
the coordinates of an image may as well be those of its spectrum, and a solver that does not clip sees no difference.

Symbols: N samples, K components, D coordinates per sample; level = log alpha_bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch as th

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType

Tensor = th.Tensor


class Mixture:
    """Components N(means[k], stds[k]^2), equally likely unless `weights` says otherwise, independent by coordinate.

    :param means: of the components, [K, ...] in the shape of a sample.
    :param stds: a number, or what broadcasts to the shape of `means`.
    :param classes: for each component the class that it belongs to; default: a class of its own.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor | float,
        *,
        weights: Sequence[float] | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        count, self.shape = len(means), tuple(means.shape[1:])
        self.means = means.double().flatten(1)
        self.variances = th.as_tensor(stds).double().square().expand_as(means).reshape(count, -1)
        self.log_weights = th.log_softmax(th.tensor(weights or [1.0] * count, dtype=th.float64).log(), dim=0)
        self.classes = th.tensor(list(range(count)) if classes is None else list(classes))

    @property
    def num_classes(self) -> int:
        return int(self.classes.max()) + 1

    def of_class(self, label: int) -> Mixture:
        """The components of one class alone."""
        kept = self.classes == label
        shape = (-1, *self.shape)
        weights = self.log_weights[kept].exp().tolist()
        return Mixture(
            self.means[kept].view(shape), self.variances[kept].sqrt().view(shape), weights=weights, classes=None
        )

    def sample(self, count: int, generator: th.Generator) -> tuple[Tensor, Tensor]:
        """Samples [count, ...] and the components that they come from [count]."""
        chosen = th.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = th.randn(count, self.means.shape[1], dtype=th.float64, generator=generator)
        return (self.means[chosen] + self.variances[chosen].sqrt() * noise).view(-1, *self.shape), chosen

    def log_joint(self, x: Tensor, level: float) -> Tensor:
        """log p(x_t, component) [N, K]."""
        alpha, x = math.exp(level / 2), x.double().flatten(1)
        precisions = 1 / (alpha**2 * self.variances - math.expm1(level))
        squares = x.square() @ precisions.T - 2 * alpha * x @ (precisions * self.means).T
        squares = squares + alpha**2 * (precisions * self.means.square()).sum(dim=1)
        normalisers = (precisions / (2 * math.pi)).log().sum(dim=1)
        return self.log_weights + (normalisers - squares) / 2

    def log_likelihood(self, x: Tensor, level: float) -> Tensor:
        """log p(x_t) [N]."""
        return self.log_joint(x, level).logsumexp(dim=1)

    def log_classes(self, x: Tensor, level: float) -> Tensor:
        """log p(class | x_t), [N, classes]."""
        joint = self.log_joint(x, level)
        per_class = [joint[:, self.classes == label].logsumexp(dim=1) for label in range(self.num_classes)]
        return th.stack(per_class, dim=1).log_softmax(dim=1)

    def denoise(self, x: Tensor, level: float, y: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t], or E[x_0 | x_t, class y] for labels y [N]."""
        return self._average(x, level, self.log_joint(x, level), y)

    def denoise_guided(self, x: Tensor, level: float, y: Tensor, scale: float) -> Tensor:
        """The x_0 of the score that guidance of `scale` by the exact classifier makes."""
        joint = self.log_joint(x, level)
        free, conditional = self._average(x, level, joint, None), self._average(x, level, joint, y)
        return free + scale * (conditional - free)

    def _average(self, x: Tensor, level: float, joint: Tensor, y: Tensor | None) -> Tensor:
        """The components' own E[x_0 | x_t, k], averaged by the posterior over the components (of class y)."""
        if y is not None:
            joint = joint.masked_fill(self.classes != y.view(-1, 1), -math.inf)
        posterior, alpha = joint.softmax(dim=1), math.exp(level / 2)
        gains = alpha * self.variances / (alpha**2 * self.variances - math.expm1(level))
        offsets = (1 - alpha * gains) * self.means
        return (posterior @ offsets + (posterior @ gains) * x.double().flatten(1)).view_as(x)


class Oracle:
    """A perfectly trained network and classifier of a `Mixture`, at any real timestep; counts the network's calls.

    Works in float64 and answers in it.
    """

    def __init__(self, process: GaussianDiffusion, data: Mixture) -> None:
        self.process, self.data, self.calls = process, data, 0

    def level(self, timesteps: Tensor) -> float:
        """log alpha_bar at the one timestep that all of a batch are at."""
        if not bool((timesteps == timesteps[0]).all()):
            raise ValueError(f"timesteps {timesteps.tolist()} differ, and the oracle answers for one at a time")
        return float(self.process.level(timesteps[:1].double()))

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """What the network of `process` is to predict; labels are ignored, as by an unconditional network."""
        self.calls += 1
        level = self.level(timesteps)
        x_start = self.data.denoise(x, level)
        kind, alpha, sigma = self.process.model_mean_type, math.exp(level / 2), math.sqrt(-math.expm1(level))
        if kind is ModelMeanType.START_X:
            return x_start
        eps = (x - alpha * x_start) / sigma
        if kind is ModelMeanType.EPSILON:
            return eps
        if kind is ModelMeanType.VELOCITY:
            return alpha * eps - sigma * x_start
        raise ValueError(f"the oracle predicts no {kind}: use EPSILON, START_X or VELOCITY")

    def classifier(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """log p(class | x_t), [N, classes]."""
        return self.data.log_classes(x, self.level(timesteps))

    def guidance(self, scale: float) -> Callable[..., Tensor]:
        """scale * grad log p(y | x_t) in closed form, as a cond_fn."""

        def cond_fn(x: Tensor, timesteps: Tensor, y: Tensor, **_: object) -> Tensor:
            level = self.level(timesteps)
            conditional, free = self.data.denoise(x, level, y), self.data.denoise(x, level)
            return scale * math.exp(level / 2) / -math.expm1(level) * (conditional - free)

        return cond_fn


def ring() -> Mixture:
    """Points of the plane, [2, 1, 1]: eight clusters of different widths on a ring, in four classes."""
    angles = th.arange(8) * (2 * math.pi / 8) + 0.3
    means = 0.7 * th.stack([angles.cos(), angles.sin()], dim=1).double()
    stds = th.tensor([0.05, 0.1, 0.05, 0.15, 0.1, 0.05, 0.15, 0.1]).view(8, 1, 1, 1)
    return Mixture(means.view(8, 2, 1, 1), stds, classes=[0, 0, 1, 1, 2, 2, 3, 3])


def images(side: int = 32) -> Mixture:
    """Images [3, side, side] in eight kinds and four classes, given by their spectra, which fall off as nature's do.

    Amplitudes fall as 1 / frequency, so that coarse features stand out of much noise and fine ones of little; half of
    the variance lies between the kinds.
    """
    frequencies = th.arange(side, dtype=th.float64)
    distance = (frequencies.view(-1, 1) ** 2 + frequencies**2).sqrt()
    amplitude = (1 / (1 + distance)).expand(3, side, side)
    amplitude = amplitude * 0.5 / amplitude.square().mean().sqrt()  # pixels then have a standard deviation of 0.5
    noise = th.randn(8, 3, side, side, dtype=th.float64, generator=th.Generator().manual_seed(0))
    return Mixture(math.sqrt(0.5) * amplitude * noise, math.sqrt(0.5) * amplitude, classes=[0, 0, 1, 1, 2, 2, 3, 3])
