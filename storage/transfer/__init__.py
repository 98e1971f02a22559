"""Two caches: a checked copy from one to the other, resumed after any interruption.

What a cache holds and how it is checked belongs to `storage.cache`; pushing and pulling as users know it to
`logit_cache.sharing`.
"""
