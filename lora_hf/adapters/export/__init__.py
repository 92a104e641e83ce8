"""Adapters in the formats of other programs. `targets` has the table; each target is a file."""
