"""Logits → sparse targets: exact top k, unbiased VarOpt samples, tail masses, on one device or over ranks.

Where the logits come from belongs to `teachers.huggingface.teacher`; neither imports the other.
"""
