"""Programs for developers, run from a clone: benchmarks against other libraries, tables for the docs, small bases."""
