"""What can be fine-tuned: each task names its rows, encodes them for a model, and scores its answers."""
