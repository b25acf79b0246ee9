"""Scores of images: features, metrics, the evaluator, likelihood, plots, sweeps, downloads of weights.

FID is computed in metrics.py; a new metric goes into scores.py, a feature extractor into features.py.
"""
