"""Tensor operations that LoRA needs: fused projections, attention, losses. They know nothing of modules."""
