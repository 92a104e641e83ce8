"""Exports an adapter for another program: the table of targets, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from lora_hf.core.atomic_io import atomic_folder, check_output_folder
from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.core.provenance import versions
from lora_hf.core.records import EXPORT_FILE, ExportRecord

# What each target writes. Each is a module here with `write(contents, folder)`, but for `merged`.
TARGETS = {
    "gguf": "adapter.gguf for llama.cpp",
    "ollama": "adapter.gguf and a Modelfile",
    "mlx": "the adapter format of mlx-lm",
    "vllm": "a PEFT adapter of one rank",
    "merged": "a plain model, as merge does",
}


def export_adapter(
    folder: str | Path,
    to: str,
    output: Path,
    model: str | None = None,
    overwrite: bool = False,
    ollama_base: str | None = None,
) -> ExportRecord:
    """Writes the adapter in `folder` to `output` in the format of another program, with a record.

    The weights of the base are neither needed nor read, except for `merged`.

    Args:
        to: one of `TARGETS`.
        model: where the base is now; by default where the adapter says.
        overwrite: replace an earlier export.
        ollama_base: what `FROM` in the Modelfile names, a model of Ollama or a file.

    Raises:
        AdapterError: no readable adapter, or one that holds what the target would drop. Nothing is written.
        ConfigError: an unknown target; `output` exists; or a package is missing.
        ModelError, HubError: the base cannot be read.
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to}: expected one of {', '.join(TARGETS)}{did_you_mean(to, TARGETS)}")
    if ollama_base is not None and to != "ollama":
        raise ConfigError(f"ollama_base={ollama_base}: only with to=ollama")
    if to == "merged":
        return _export_merged(folder, output, model, overwrite)
    check_output_folder(output, EXPORT_FILE, overwrite)  # before importing torch takes seconds
    from lora_hf.adapters.export.contents import read_contents

    contents = read_contents(folder, model)
    write: Callable[..., list[str]] = import_module(f"lora_hf.adapters.export.{to}").write
    options = {"base": ollama_base} if to == "ollama" else {}
    with atomic_folder(output, EXPORT_FILE, overwrite) as written:
        notes = write(contents, written, **options)
        files = {file.name: file.stat().st_size for file in sorted(written.iterdir())}
        record = ExportRecord(to, contents.base, str(contents.file.folder), files, notes, versions())
        record.write(written / EXPORT_FILE)
    return record


def _export_merged(folder: str | Path, output: Path, model: str | None, overwrite: bool) -> ExportRecord:
    """A merge checks itself and has a record of its own, which this one quotes."""
    from lora_hf.adapters.merge import merge_adapter
    from lora_hf.adapters.resolve import find_saved_model

    merged = merge_adapter(find_saved_model(folder, model=model), output, overwrite=overwrite)
    files = {file.name: file.stat().st_size for file in sorted(output.iterdir())}
    return ExportRecord("merged", merged.base, merged.adapter, files, [f"vllm serve {output}"], merged.versions)
