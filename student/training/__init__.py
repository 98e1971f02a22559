"""One run of `train-student`: checked, trained or resumed, evaluated, saved.

Many runs belong to `student.sweep.run`; the loss to `student.loss`.
"""
