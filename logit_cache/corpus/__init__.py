"""Text → token stream: sources, cleaning, tokenizers, chat templates.

What a stream is on disk belongs to `storage`; what a teacher says of it to `logit_cache.caching`.
"""
