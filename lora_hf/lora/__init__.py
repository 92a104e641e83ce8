"""The method: LoRA layers and their kernels, which modules of a model get one, and the model-wide operations on them.

Start at `inject`; `layers` holds the maths and `architectures` the table of model types."""
