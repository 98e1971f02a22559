"""A transformers model → float32 logits: its files, how its layers lie on devices, the fast way past its head.

What is kept of the logits belongs to `teachers.reduction`; neither imports the other.
"""
