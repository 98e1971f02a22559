"""Files and data sets as a stream of documents: which there are, how each format is read, which rows cannot be.

What a row means belongs to `logit_cache.corpus.rows`; tokens to `logit_cache.corpus`.
"""
