"""Diffusion models of images: training, sampling and classifier guidance.

A drop-in successor of openai/guided-diffusion and of crowsonkb's fork of it. Importing the package alone imports
nothing else, so that ``guided-diffusion --help`` answers at once: import the modules you need, such as
``guided_diffusion.script_util``.
"""

__version__ = "0.1.0"
