"""A suite trains many tasks on one base in several configurations, and collects one record of all runs.

`benchmark glue` and `benchmark nlg` are suites. The package plans the runs, starts them, and renders tables and plots.
"""
