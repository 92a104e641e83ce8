"""Runs of the same task side by side: numbers with their uncertainty, pictures, and a page. Never loads torch."""
