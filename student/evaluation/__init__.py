"""Evaluation of a model: held-out text, the KL to its teachers, minimal pairs.

Nothing here trains.
"""
