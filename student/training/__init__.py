"""One run of `train-student`: checked, trained or resumed, evaluated, saved.

Sweeps of many runs are in `student.sweep`, the loss in `student.loss`.
"""
