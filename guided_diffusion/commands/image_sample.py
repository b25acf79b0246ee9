"""Sample from a diffusion model and save the images in an npz."""

from .entry import entry

main = entry("image_sample", "sampling.sample")
