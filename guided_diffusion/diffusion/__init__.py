"""The base classes of ../gaussian_diffusion.py: the forward process, and the originals' sampling methods."""
