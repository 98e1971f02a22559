"""Many runs from one file: what is searched, the trials, and their record.

One run belongs to `student.training`.
"""
