"""Logits → sparse targets: exact top k, unbiased VarOpt samples, tail masses, on one device or over ranks.

Computing the logits belongs to `teachers.huggingface`; neither imports the other.
"""
