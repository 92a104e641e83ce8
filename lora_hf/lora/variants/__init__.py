"""Variants of LoRA, a file each: with its formula, its source, and what it changes of the plain one in `layers`."""
