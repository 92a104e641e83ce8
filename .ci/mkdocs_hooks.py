"""Collects the pages of the site in one folder: those in docs/, and others such as README and the API reference.

MkDocs calls `on_config` before each build. The i18n plugin only reads files, so generated pages are written too. Links
that leave docs/ are changed to where their target is in the site.
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
# The pages at the root of the repository, and their names in the site.
TOP_PAGES = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog", "SECURITY": "security"}
# The modules in the API reference, in import order.
MODULES = (
    "core.config.schema", "core.config.loader", "core.errors", "core.records", "lora.inject", "lora.layers",
    "lora.target_modules", "lora.architectures", "lora.variants.table", "lora.kernels.reference",
    "lora.kernels.fused", "lora.unpadding", "lora.multi_adapter", "data.tasks.base", "data.tasks.generation",
    "data.metrics.glue", "data.metrics.texts", "models.load", "adapters.pretrained", "adapters.save_load",
    "adapters.merge", "adapters.combine", "adapters.push", "adapters.convert.loralib", "training.run",
    "inference.classify", "inference.generate", "experiments.sweep.study", "experiments.sweep.lr_find",
    "experiments.compare.comparison",
    "serving.engine",
)  # fmt: skip
BLANK_LINE = "\n\n"
LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))")
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Writes the pages, and drops navigation entries whose page does not exist."""
    if config.docs_dir != str(LAID_OUT):
        lay_out(LAID_OUT)
        config.docs_dir = str(LAID_OUT)
        config.nav = _existing(config.nav)
    else:
        # MkDocs builds the second language with the same plugins. autorefs would warn that every name exists twice.
        config.plugins["autorefs"]._primary_url_map.clear()
    return config


def lay_out(target: Path) -> None:
    """Replaces the folder `target` by all sources of the site."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(REPO / "docs", target, ignore=shutil.ignore_patterns("*.md"))
    for page in sorted((REPO / "docs").rglob("*.md")):
        _write(target, page, site_path(page), page.read_text(encoding="utf-8"))
    for name in TOP_PAGES:
        for page in sorted(REPO.glob(f"{name}*.md")):
            _write(target, page, site_path(page), page.read_text(encoding="utf-8"))
    for notebook in sorted((REPO / "docs").rglob("*.ipynb")):
        _write(target, notebook, site_path(notebook).with_suffix(".md"), notebook_page(notebook))
    for name, text in reference().items():
        _save(target / "reference" / f"{name}.md", text)


def site_path(file: Path) -> PurePosixPath:
    """The path of a repository file in the site. Files in docs/ keep their path."""
    inside = PurePosixPath(file.relative_to(REPO).as_posix())
    if inside.parts[0] == "docs":
        return inside.relative_to("docs")
    stem, dot, rest = inside.name.partition(".")
    if inside.parent == PurePosixPath() and stem in TOP_PAGES:
        return PurePosixPath(f"{TOP_PAGES[stem]}{dot}{rest}")
    return PurePosixPath("files") / inside


def convert_links(text: str, page: Path, target: Path) -> str:
    """The Markdown of `page` with links that work in the site. Copies linked files that are not pages to `target`."""
    here = site_path(page).parent

    def convert(match: re.Match[str]) -> str:
        link, mark, anchor = match[0].partition("#")
        file = (page.parent / link).resolve()
        if not link or "://" in link or link.startswith("mailto:") or not file.is_relative_to(REPO):
            return match[0]
        if file.is_dir() or not file.exists():
            return match[0]  # MkDocs names it in its warning
        path = site_path(file)
        if path.parts[0] == "files":
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / path)
        return f"{os.path.relpath(path, here)}{mark}{anchor}"

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(convert, part) for part in parts[::2]]
    return "".join(parts)


def notebook_page(notebook: Path) -> str:
    """A notebook as Markdown: its texts, its code and the text output of each cell."""
    parts = [f"[Download this notebook]({notebook.name})"]
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
    """The pages of the API reference by name: an index of the public names, and a page for each of `MODULES`."""
    lines = [
        "# Public names",
        "",
        "You can import these names from `lora_hf` directly.",
        "",
        "| name | description |",
        "| --- | --- |",
    ]
    for name in lora_hf.__all__:
        module = f"lora_hf.{lora_hf._HOME[name]}"
        origin = importlib.util.find_spec(module).origin
        tree = ast.parse(Path(origin).read_text(encoding="utf-8"))
        defined = next(node for node in tree.body if getattr(node, "name", None) == name)
        docstring = ast.get_docstring(defined) or ""
        lines.append(f"| [{name}][{module}.{name}] | {' '.join(docstring.partition(BLANK_LINE)[0].split())} |")
    pages = {"index": "\n".join(lines) + "\n"}
    options = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    for module in MODULES:
        pages[module] = f"# lora_hf.{module}\n\n::: lora_hf.{module}\n{options}"
    return pages


def _write(target: Path, page: Path, path: PurePosixPath, text: str) -> None:
    # The site has its own language switch.
    text = re.sub(r"^\[[^]]+\]\(README[.\w]*\.md\)\n\n", "", text, flags=re.MULTILINE)
    _save(target / path, convert_links(text, page, target))


def _save(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _existing(nav: list[Any]) -> list[Any]:
    """The navigation without pages that do not exist, and with the modules instead of `reference/*`."""
    existing: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, inner),) = entry.items()
            existing.append({title: _existing(inner)})
        elif entry == "reference/*":
            existing += [{module: f"reference/{module}.md"} for module in MODULES]
        elif (LAID_OUT / entry).is_file():
            existing.append(entry)
    return existing
