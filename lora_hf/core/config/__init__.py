"""The config of a run: its sections and keys, YAML files, overrides, and hints for misspelled keys."""
