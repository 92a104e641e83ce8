"""Markdown tables for docs/results, each rendered from records."""
