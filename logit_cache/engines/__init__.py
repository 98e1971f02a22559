"""Where workers run and who gets which shard: this machine, Ray, Slurm, torchrun.

What a worker does with a shard belongs to `logit_cache.caching`.
"""
