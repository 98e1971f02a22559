"""How workers are started and which worker gets which shard: this machine, Ray, Slurm, torchrun.

Scoring and committing one shard belong to `logit_cache.caching`.
"""
