"""How good a model is: held-out text, the KL to its teachers, minimal pairs.

Nothing here trains.
"""
