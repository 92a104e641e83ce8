"""All private members of transformers, accelerate and torch that lora_hf uses, each with a reason.

A new version may change any of them without notice. Then these tests name it. CI runs them with the newest versions.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, Trainer
from transformers.configuration_utils import PreTrainedConfig

from tests.support.small_models import small_model

PACKAGE = Path(__file__).parents[2] / "lora_hf"

# Member: (parameters as we rely on them, reason).
TRAINER_METHODS = {
    "_get_train_sampler": (["self", "train_dataset"], "rows of one prompt together; length groups drawn per epoch"),
    "_get_eval_sampler": (["self", "eval_dataset"], "predictions in the order of the file, however training samples"),
    "_load_from_checkpoint": (["self", "resume_from_checkpoint", "model"], "a checkpoint holds the adapter alone"),
    "_load_best_model": (["self"], "the best checkpoint holds the adapter alone"),
}
# Called, not overridden.
TRAINER_CALLS = {
    "_save_checkpoint": (["self", "model", "trial"], "a signal in an evaluation saves what was trained before it"),
    "_load_rng_state": (["self", "checkpoint"], "an evaluation that is repeated draws the same numbers"),
    "_save_rng_state": (["self", "output_dir"], "what follows a repeated evaluation draws the same numbers"),
}
CONFIG_ATTRIBUTES = {"_attn_implementation": "whether a model's attention was chosen by the user"}
TORCH_ATTRIBUTES = {
    "_modules": "a walk that leaves out what adapters add; named_children hides the second name of a child",
    "_version": "the counter of in-place changes detects a base that changed after it was hashed",
    "_ddp_params_and_buffers_to_ignore": "DDP sends no buffers of a frozen base; its argument for that is deprecated",
    "_forward_pre_hooks": "detects a model that already runs without padding; its copies have the hooks too",
    "_forward_hooks": "a last layer keeps few tokens only if no hook of somebody else would see them",
}
# Our own names with an underscore, and documented hooks of torch.
OURS = {"_apply", "_replace", "_asdict", "_fields", "_build_data_dir", "_info", "_compute", "_buffers", "_parameters"}


@pytest.mark.parametrize("name", [*TRAINER_METHODS, *TRAINER_CALLS])
def test_the_trainer_still_has_the_method(name: str) -> None:
    parameters, reason = (TRAINER_METHODS | TRAINER_CALLS)[name]
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers dropped Trainer.{name}, which training/trainer.py needs: {reason}"
    found = list(inspect.signature(method).parameters)
    assert found == parameters, f"transformers changed Trainer.{name} to take {found}; training/trainer.py: {reason}"


@pytest.mark.parametrize("name", CONFIG_ATTRIBUTES)
def test_the_config_still_has_the_attribute(name: str) -> None:
    assert hasattr(PreTrainedConfig(), name), f"transformers dropped config.{name}: {CONFIG_ATTRIBUTES[name]}"


def test_from_pretrained_still_marks_what_it_loaded(tmp_path: Path) -> None:
    small_model("bert").bert.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    unmarked = {name for name, each in model.named_parameters() if not hasattr(each, "_is_hf_initialized")}
    assert unmarked >= {"classifier.weight", "classifier.bias"}, (
        "transformers marks loaded parameters in another way; lora/heads.py takes the others for a new head"
    )
    assert not any("encoder" in name for name in unmarked)


def overridden(tree: ast.Module) -> set[str]:
    """The private methods of the Trainer that the classes of a file override."""
    methods = {
        node.name
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef)
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and not node.name.startswith("__")
    }
    return {name for name in methods if hasattr(Trainer, name)}


def test_no_other_private_method_of_the_trainer_is_overridden() -> None:
    found = {
        name: str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        for name in overridden(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert found == dict.fromkeys(TRAINER_METHODS, "training/trainer.py")


def test_no_other_private_member_is_used() -> None:
    """Wherever the code uses `x._name`, x is self or cls, or `_name` is ours or listed above."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {
            target.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in ast.walk(node)
            if isinstance(target, ast.Attribute)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                continue
            if node.attr not in {*OURS, *own, *TRAINER_METHODS, *CONFIG_ATTRIBUTES, *TORCH_ATTRIBUTES}:
                found[f"{file.relative_to(PACKAGE)}:{node.lineno}"] = ast.unparse(node)
    assert not found
