"""Stored targets against the live teacher: how far they are from its distributions, and whether they are its own.

Checks of bytes against receipts belong to `storage.cache`.
"""
