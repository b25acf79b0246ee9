"""Scores of generated images that agree with the published evaluator, without TensorFlow."""
