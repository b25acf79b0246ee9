"""Parts of ../train_util.py: checkpoints, state of a run, noise of a step, gradients, sharding, fine-tuning, adapters.

A checkpoint is written in saving.py and read in checkpoints.py.
"""
