"""Compares finished runs of the same task: statistics, plots, and a report in Markdown and HTML.

It reads run folders and never loads torch.
"""
