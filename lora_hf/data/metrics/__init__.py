"""`evaluate.Metric` subclasses that need no network: predictions and references in, named floats out."""
