"""Provenance: frozen records of a cache's content and origin, and the receipts that commit its shards.

Every record is JSON that carries the sha256 of its own canonical form (sorted keys, no white space, without
the `sha256` field), so a changed byte shows. Records hold no paths: the key of every object follows from
the array's name and the shard's number.
"""
