"""One training run, in one process or several: `run.train` goes from a config to a run folder."""
