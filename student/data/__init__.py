"""A cache as training batches: windows of tokens with their targets, in an order fixed by one seed.

Computations on a batch belong to `student.loss`.
"""
