"""Samplers as pure functions of tensors: schedules, steps, samplers, solvers, the loop, guidance, editing.

A new sampler goes into samplers.py, a grid of steps or a schedule into schedules.py, guidance into guidance.py.
"""
