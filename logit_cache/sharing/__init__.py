"""Sharing caches between labs: push, pull, the Hugging Face hub, the data set card, signatures.

Copying itself belongs in `storage.transfer`.
"""
