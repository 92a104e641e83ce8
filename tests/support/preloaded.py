"""Imports what nearly every run needs, as a command of the package does: without PEFT, and no garbage collected."""

from lora_hf.core.imports import heavy_imports, hide_peft

hide_peft()
with heavy_imports():
    import transformers.models.roberta.modeling_roberta  # noqa: F401

    import lora_hf.data.metrics.glue
    import lora_hf.inference.classify
    import lora_hf.training.run  # noqa: F401
