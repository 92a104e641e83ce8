"""What a model can be fine-tuned for: each task reads its rows, encodes them for a model, and scores predictions."""
