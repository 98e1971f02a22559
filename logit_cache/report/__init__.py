"""Finished work as one HTML page: what was gained, how sure it is, what it cost.

Nothing is measured here; the figures are read from what runs left behind.
"""
