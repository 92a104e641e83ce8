"""Adapters on disk and on the hub, in PEFT's format. Saves, loads, merges, combines, converts and uploads them."""
