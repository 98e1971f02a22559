"""A sweep of many runs from one file: the search space, the trials, and their records.

A single run is in `student.training`.
"""
