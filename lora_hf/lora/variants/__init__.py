"""Variants of LoRA, one in each file: its formula, its source, and how it differs from the plain one in `layers`."""
