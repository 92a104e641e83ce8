"""Inference with trained weights: class probabilities and generated texts. Used from Python and by the CLI."""
