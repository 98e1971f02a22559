"""Entries of a cache → files that other people's trainers read: `logit-cache export`. Whatever a format cannot say is
refused, or counted and reported; `logit_cache.importing` reads all of them again."""
