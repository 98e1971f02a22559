"""Models and tokenizers as they lie on disks and hubs: loaded, checked against a cache, put right.

No training and no caches' targets here.
"""
