"""Copying: a checked copy of a cache to another location, which resumes after any interruption.

The content of a cache and its checks belong to `storage.cache`; the push and pull commands to `logit_cache.sharing`.
"""
