"""`make docs` builds the site without warnings, with every page in both languages and no external resources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_hf
from tests.support.pages import REPO

pytestmark = pytest.mark.full

for package in ("mkdocs", "mkdocs_static_i18n", "mkdocstrings"):
    pytest.importorskip(package, reason="the extra docs is not installed")

# What a browser loads by itself, unlike links that a reader follows.
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video)[^>]*\ssrc=[\"']?([^\"' >]+)|<link[^>]*\shref=[\"']?([^\"' >]+)"
)
EXTERNAL = re.compile(r"^(?:https?:)?//")
IMPORTED = re.compile(r"@import[^;]*?//[^;]*|url\(\s*[\"']?(?:https?:)?//[^)]*\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. MkDocs itself checks links and anchors, and --strict makes its warnings errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "LORA_HF_PAGES": str(tmp_path_factory.mktemp("pages"))}
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text(encoding="utf-8")


def test_every_page_is_in_both_languages(site: Path) -> None:
    pages = [file.relative_to(REPO / "docs").with_suffix("") for file in (REPO / "docs").rglob("*.md")]
    names = [str(name) for name in pages if name.suffix != ".vi"]
    for name in ("", "contributing", "changelog", "security", "reference", *names):
        assert 'lang="en"' in page(site, name), name
        assert 'lang="vi"' in page(site, f"vi/{name}"), name


def test_links_of_the_readme_point_into_the_site(site: Path) -> None:
    home = page(site, "")
    assert not re.findall(r'(?:href|src)="(?:docs/|[A-Z]+\.md)[^"]*"', home)
    for target in ("adapters/", "contributing/", "files/LICENSE"):
        assert f'href="{target}"' in home
    assert (site / "files" / "LICENSE").read_bytes() == (REPO / "LICENSE").read_bytes()


def test_the_reference_has_every_public_name(site: Path) -> None:
    index = page(site, "reference")
    for name in lora_hf.__all__:
        module = f"lora_hf.{lora_hf._HOME[name]}"
        link = re.search(rf'href="([^"]+)#{re.escape(f"{module}.{name}")}"', index)
        assert link, name
        assert f'id="{module}.{name}"' in page(site, f"reference/{link[1]}")
    assert "lora_alpha" in page(site, "reference/core.config.schema")


def test_no_external_resource_is_loaded(site: Path) -> None:
    found = []
    for file in site.rglob("*.html"):
        loaded = [one or other for one, other in LOADED.findall(file.read_text(encoding="utf-8"))]
        found += [f"{file.relative_to(site)}: {target}" for target in loaded if EXTERNAL.match(target)]
    for file in site.rglob("*.css"):
        found += [f"{file.relative_to(site)}: {hit}" for hit in IMPORTED.findall(file.read_text(encoding="utf-8"))]
    assert not found


def test_loaded_resources_are_found() -> None:
    html = (
        '<script src="https://a.example/b.js"></script><link rel=x href=//c.example/d.css><a href="https://e.example">'
    )
    assert LOADED.findall(html) == [("https://a.example/b.js", ""), ("", "//c.example/d.css")]
