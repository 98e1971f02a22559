"""Caches between labs: push, pull, the hub, the card, signatures.

The copying itself belongs to `storage.transfer`.
"""
