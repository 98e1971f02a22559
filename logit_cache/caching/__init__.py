"""One caching job: its configuration, checks, scoring of a shard, status and cost forecast; recompression.

Running the workers belongs to `logit_cache.engines`.
"""
