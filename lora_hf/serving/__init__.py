"""Many adapters on one base, answered together: the engine, and HTTP in front of it."""
