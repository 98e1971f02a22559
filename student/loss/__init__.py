"""Targets and logits → one number and its gradient: divergences, tails, mixtures, the fused output layer.

Nothing here knows of caches, files or the trainer.
"""
