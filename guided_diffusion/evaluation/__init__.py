"""Scores of images: features, metrics, the evaluator, likelihood, plots, sweeps, weights of Inception.

A comparison is open_images -> feature_set -> METRICS. A new metric is a function in metrics.py and an entry in
scores.py; a new feature extractor is an entry in features.py.
"""
