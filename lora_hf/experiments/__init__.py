"""Experiments of many runs: hyperparameter sweeps, suites of tasks, and comparisons of finished runs.

Every number in their reports, tables and plots comes from the records of the runs.
"""
