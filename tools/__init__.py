"""Programs for developers, run from a clone: measurements against other libraries, tables for the docs, pretraining of the small bases."""
