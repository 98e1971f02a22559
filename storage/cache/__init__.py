"""One cache: opened, read, written, verified and repaired, every byte against its receipt.

Encoding belongs to `storage.format`, storing objects to `storage.stores`, copying to `storage.transfer`.
"""
