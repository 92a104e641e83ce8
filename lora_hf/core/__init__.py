"""Configs, records, errors and files: what everything else stands on. Nothing here imports torch or transformers."""
