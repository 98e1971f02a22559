"""The student's side: stored targets in, a trained model out.

Importing this package imports nothing else, so that command lines can describe themselves without torch.
`student.loss.distillation` is the loss, `student.models` makes the models, `student.evaluation.held_out` judges them.
"""
