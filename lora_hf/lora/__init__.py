"""LoRA itself: its layers, variants and kernels, which modules of a model they adapt, and what a base needs for them.

Start at `inject`; `layers` holds the formulas and `architectures` the table of model types."""
