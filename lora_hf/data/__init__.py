"""Tasks and their rows: where they are read from, how they become model inputs, and how outputs are scored."""
