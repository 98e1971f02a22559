"""The commands `cache-logits` and `logit-cache`: each parses, calls one function and prints its result.

click is imported here and nowhere else of this package; no work is done here.
"""
