"""Sample from a diffusion model, guided by a classifier of noisy images."""

from .entry import entry

main = entry("classifier_sample", "sampling.sample")
