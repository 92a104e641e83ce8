"""Metrics of predictions and generated texts, equal to the official scorers' and without a download at run time."""
