"""The flags of how likelihoods are measured. As in config.py, a field is a flag, and nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import flag


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured of the images."""

    likelihood: str = flag(
        "vlb", "vlb: the variational bound; flow: the likelihood of the probability flow", choices=("vlb", "flow")
    )
    spread: bool = flag(False, "take --num_samples images evenly over the data, not the first ones by name")
    save_terms: bool = flag(False, "vlb: keep the terms of each image too, as arr_1 [N, T] beside their means")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How the likelihood of the probability flow is measured."""

    dequantize: str = flag(
        "uniform",
        "what 8-bit pixels become: uniform, a point of their bin; decoder, noised by the first step of diffusion and "
        "read back by the network, as in the variational bound",
        choices=("uniform", "decoder"),
    )
    probes: int = flag(1, "random directions along which the divergence is measured", at_least=1)
    probe_noise: str = flag("rademacher", "what they are drawn from", choices=("rademacher", "gaussian"))
    flow_solver: str = flag(
        "rk45", "rk45: steps as long as --flow_tolerance allows; heun: the steps of the grid", choices=("rk45", "heun")
    )
    flow_tolerance: float = flag(1e-4, "rk45: the error of a step, absolute and relative, at most", at_least=1e-9)
