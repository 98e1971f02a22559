"""Rows of messages as text, and which of its characters are trained on.

No tokens here, and no files: `logit_cache.corpus` reads the rows and tokenises the text.
"""
