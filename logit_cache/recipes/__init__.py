"""Whole experiments from text to report, stage by stage: the published recipes and the demo.

Every stage is a public command; nothing is trained or cached here.
"""
