"""Many runs of one config, to find the values that score best on the development rows."""
