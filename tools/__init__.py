"""Developer tools, run from a clone: benchmarks, tables for the docs, and pretraining of the bundled bases."""
