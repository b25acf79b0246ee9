"""The forward process of ../gaussian_diffusion.py, and the originals' sampling methods over the one loop."""
