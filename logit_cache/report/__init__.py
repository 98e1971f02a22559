"""Finished work as one HTML page: the gain of distillation, its uncertainty, its cost.

Nothing is measured here; all numbers are read from the records of runs and caches.
"""
