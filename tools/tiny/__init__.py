"""Pretraining of the bundled bases: `pretrain` trains one by its recipe, and `evidence` shows what they predict."""
