"""Conversion from and to the files of other LoRA libraries. At present loralib."""
