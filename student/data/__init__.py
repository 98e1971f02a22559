"""A cache → batches: windows of tokens with their targets, in an order that one seed fixes.

What is computed from a batch belongs to `student.loss`.
"""
