"""Measures: the sides of a comparison, a process each, taking turns on the same rows."""
