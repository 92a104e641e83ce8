"""The verbs of the command line, a file each: `add` describes the verb, `run` does it."""
