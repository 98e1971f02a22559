"""Stored targets against the live teacher: how far they are from it, and whether they are its own.

Bytes against their receipts belong to `storage.cache`.
"""
