"""What a cache holds at single positions: tokens and the distributions of the next one, as text. No summaries of whole
entries, which are `logit_cache.describe`'s, and no pages, which are `logit_cache.report`'s."""
