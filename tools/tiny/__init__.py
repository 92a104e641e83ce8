"""Pretraining of the embedded bases: `pretrain` trains one by its recipe, and `evidence` shows what they predict."""
