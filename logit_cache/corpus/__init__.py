"""Text → token stream: sources, cleaning, tokenizers, chat templates.

The stream's format belongs to `storage`, its scoring by a teacher to `logit_cache.caching`.
"""
