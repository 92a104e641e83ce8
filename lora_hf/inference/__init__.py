"""Classify texts and generate text with a trained run, from Python and from files."""
