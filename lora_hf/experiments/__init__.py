"""Many runs: hyper-parameter sweeps, the multi-task benchmark, and side-by-side reports."""
