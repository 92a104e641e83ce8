"""A benchmark over many tasks on one base: plan the runs, start them, collect one record."""
