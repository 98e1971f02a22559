"""One caching job: asked for, checked, one shard scored, how far it is, how dear it is.

Where workers run belongs to `logit_cache.engines.run`.
"""
