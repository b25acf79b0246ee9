"""Enlarge images with an upsampler and save them in an npz, in the order in which they came."""

from .entry import entry

main = entry("super_res_sample", "sampling.enlarge")
