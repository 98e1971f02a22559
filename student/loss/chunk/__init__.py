"""One chunk of rows of logits: sums and gradients over its columns, in torch and as Triton kernels.

Not here: what a loss makes of them (`student.loss.fused`, `student.loss.student_logprobs`).
"""
