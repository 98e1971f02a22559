"""One cache: opened, read, written, checked and repaired, every byte against its receipt.

How objects are encoded belongs to `storage.format`, where they lie to `storage.stores`, copying to
`storage.transfer.copy`.
"""
