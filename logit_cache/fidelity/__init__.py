"""Stored targets against the live teacher: how far they are from its distributions, and whether they are its own; and
against what targets must satisfy whoever made them.

Checks of bytes against receipts belong to `storage.cache`.
"""
