"""From and to the files of other LoRA libraries."""
