"""Processes and files, without diffusion: launchers, log writers, seeds, options, paths, files, npz, pictures, jobs.

A kind of file that is read or written in a new way goes into files.py, a way to start processes into launchers.py.
"""
