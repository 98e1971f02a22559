"""The distillation loss and its gradient: divergences, treatments of the tail, mixtures, the fused LM head.

Nothing here depends on caches, files or the trainer.
"""
