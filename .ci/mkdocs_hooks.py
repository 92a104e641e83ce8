"""Lays out the pages of the site: what docs/ holds, and what it does not, such as README and the API reference.

MkDocs calls `on_config` before each build. The pages are written into one folder, because the plugin for the languages
reads files alone, and links that leave docs/ are turned to where their target stands in the site.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

import lora_hf

REPO = Path(__file__).resolve().parent.parent
LAID_OUT = Path(os.environ.get("LORA_HF_PAGES") or REPO / "build" / "pages").resolve()
# Where a file of the repository stands in the site, if not where it stands in docs/.
TOP_PAGES = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog", "SECURITY": "security"}
# The modules that the reference shows besides the public names, in the order in which data walk through them.
ROOMS = (
    "core.config.schema", "core.config.loader", "core.errors", "core.records", "lora.inject", "lora.layers",
    "lora.target_modules", "lora.architectures", "lora.variants.table", "lora.kernels.reference",
    "lora.kernels.fused", "lora.unpadding", "lora.multi_adapter", "data.tasks.base", "data.tasks.generation",
    "data.metrics.glue", "data.metrics.texts", "models.load", "adapters.save_load", "adapters.merge",
    "adapters.combine", "adapters.push", "adapters.convert.loralib", "training.run", "training.joint",
    "inference.classify", "inference.generate", "experiments.sweep.study", "experiments.compare.comparison",
    "serving.engine",
)  # fmt: skip
BLANK_LINE = "\n\n"
LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))")
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Writes the pages, and leaves out of the navigation those that do not exist."""
    if config.docs_dir != str(LAID_OUT):
        lay_out(LAID_OUT)
        config.docs_dir = str(LAID_OUT)
        config.nav = _existing(config.nav)
    else:
        # The same plugins build the second language, and would find every name of the reference twice.
        config.plugins["autorefs"]._primary_url_map.clear()
    return config


def lay_out(target: Path) -> None:
    """Writes everything that the site is made of into the folder `target`, anew."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(REPO / "docs", target, ignore=shutil.ignore_patterns("*.md"))
    for page in sorted((REPO / "docs").rglob("*.md")):
        _write(target, page, place_of(page), page.read_text(encoding="utf-8"))
    for name in TOP_PAGES:
        for page in sorted(REPO.glob(f"{name}*.md")):
            _write(target, page, place_of(page), page.read_text(encoding="utf-8"))
    for notebook in sorted((REPO / "docs").rglob("*.ipynb")):
        _write(target, notebook, place_of(notebook).with_suffix(".md"), notebook_page(notebook))
    for name, text in reference().items():
        _save(target / "reference" / f"{name}.md", text)


def place_of(file: Path) -> PurePosixPath:
    """Where a file of the repository stands in the site; what is in docs/ stands there as it does here."""
    inside = PurePosixPath(file.relative_to(REPO).as_posix())
    if inside.parts[0] == "docs":
        return inside.relative_to("docs")
    stem, dot, rest = inside.name.partition(".")
    if inside.parent == PurePosixPath() and stem in TOP_PAGES:
        return PurePosixPath(f"{TOP_PAGES[stem]}{dot}{rest}")
    return PurePosixPath("files") / inside


def turn_links(text: str, page: Path, target: Path) -> str:
    """The Markdown of `page` with links that lead from its place in the site; files that are no page come along."""
    here = place_of(page).parent

    def turn(match: re.Match[str]) -> str:
        link, mark, anchor = match[0].partition("#")
        file = (page.parent / link).resolve()
        if not link or "://" in link or link.startswith("mailto:") or not file.is_relative_to(REPO):
            return match[0]
        if file.is_dir() or not file.exists():
            return match[0]  # MkDocs names it in its warning
        place = place_of(file)
        if place.parts[0] == "files":
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / place)
        return f"{os.path.relpath(place, here)}{mark}{anchor}"

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(turn, part) for part in parts[::2]]
    return "".join(parts)


def notebook_page(notebook: Path) -> str:
    """A notebook as Markdown: its texts, its code and the text that each cell put out."""
    parts = [f"[The notebook itself]({notebook.name})"]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        texts = ["".join(put.get("text") or put.get("data", {}).get("text/plain", "")) for put in cell["outputs"]]
        if any(texts):
            parts.append(f"```text\n{''.join(texts).rstrip()}\n```")
    title = next(index for index, part in enumerate(parts) if part.startswith("# "))
    return "\n\n".join([parts.pop(title), *parts]) + "\n"


def reference() -> dict[str, str]:
    """The pages of the reference, by name: the public names, and a page a room, which mkdocstrings fills."""
    lines = [
        "# Public names",
        "",
        "What `from lora_hf import ...` gives.",
        "",
        "| name | what it does |",
        "| --- | --- |",
    ]
    for name in lora_hf.__all__:
        module = f"lora_hf.{lora_hf._HOME[name]}"
        origin = importlib.util.find_spec(module).origin
        tree = ast.parse(Path(origin).read_text(encoding="utf-8"))
        defined = next(node for node in tree.body if getattr(node, "name", None) == name)
        said = ast.get_docstring(defined) or ""
        lines.append(f"| [{name}][{module}.{name}] | {' '.join(said.partition(BLANK_LINE)[0].split())} |")
    pages = {"index": "\n".join(lines) + "\n"}
    options = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    for room in ROOMS:
        pages[room] = f"# lora_hf.{room}\n\n::: lora_hf.{room}\n{options}"
    return pages


def _write(target: Path, page: Path, place: PurePosixPath, text: str) -> None:
    # The site has a switch of languages of its own.
    text = re.sub(r"^\[[^]]+\]\(README[.\w]*\.md\)\n\n", "", text, flags=re.MULTILINE)
    _save(target / place, turn_links(text, page, target))


def _save(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _existing(nav: list[Any]) -> list[Any]:
    """The navigation without the pages that are not written yet, and with the rooms in place of `reference/*`."""
    kept: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, inner),) = entry.items()
            kept.append({title: _existing(inner)})
        elif entry == "reference/*":
            kept += [{room: f"reference/{room}.md"} for room in ROOMS]
        elif (LAID_OUT / entry).is_file():
            kept.append(entry)
    return kept
