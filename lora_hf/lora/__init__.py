"""LoRA: its layers, variants and kernels, the choice of modules to adapt, and the preparation of the base.

Start at `inject`; `layers` holds the formulas and `architectures` the table of model types."""
