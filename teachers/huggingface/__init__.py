"""A transformers model → float32 logits: its files, the placement of its layers, and the fast path to its logits.

The reduction of logits to sparse targets belongs to `teachers.reduction`; neither imports the other.
"""
