"""`make docs`: the site builds without a warning, holds every page in both languages, and loads nothing from afar."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_hf
from tests.support.pages import REPO

for needed in ("mkdocs", "mkdocs_static_i18n", "mkdocstrings"):
    pytest.importorskip(needed, reason="the extra docs is not installed")

# What a browser loads by itself, unlike a link that a person follows.
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video)[^>]*\ssrc=[\"']?([^\"' >]+)|<link[^>]*\shref=[\"']?([^\"' >]+)"
)
ELSEWHERE = re.compile(r"^(?:https?:)?//")
IMPORTED = re.compile(r"@import[^;]*?//[^;]*|url\(\s*[\"']?(?:https?:)?//[^)]*\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "LORA_HF_PAGES": str(tmp_path_factory.mktemp("pages"))}
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text(encoding="utf-8")


def test_pages_stand_in_both_languages(site: Path) -> None:
    names = [file.relative_to(REPO / "docs").with_suffix("") for file in (REPO / "docs").rglob("*.md")]
    for name in (each for each in names if not each.name.endswith(".vi")):
        for language in ("", "vi"):
            assert (site / language / name / "index.html").is_file(), name
    for name in ("", "contributing", "changelog", "reference", "vi"):
        assert 'lang="vi"' in page(site, name) or 'lang="en"' in page(site, name)
    assert 'lang="vi"' in page(site, "vi/adapters")


def test_links_of_the_readme_lead_into_the_site(site: Path) -> None:
    home = page(site, "")
    for target in ("docs/", "CONTRIBUTING.md", "README.md"):
        assert f'href="{target}' not in home
    for target in ("adapters/", "results/#speed", "contributing/", "files/LICENSE"):
        assert f'href="{target}"' in home
    assert (site / "files" / "LICENSE").read_bytes() == (REPO / "LICENSE").read_bytes()
    assert 'src="results/suite/parameters.png"' in home


def test_the_reference_has_every_public_name(site: Path) -> None:
    shown = page(site, "reference")
    for name in lora_hf.__all__:
        module = f"lora_hf.{lora_hf._HOME[name]}"
        link = re.search(rf'href="([^"]+)#{re.escape(f"{module}.{name}")}"', shown)
        assert link, name
        assert f'id="{module}.{name}"' in page(site, f"reference/{link[1]}")
    assert "lora_alpha" in page(site, "reference/core.config.schema")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    found = []
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        loaded = [one or other for one, other in LOADED.findall(text)]
        found += [f"{file.relative_to(site)}: {target}" for target in loaded if ELSEWHERE.match(target)]
    for file in site.rglob("*.css"):
        found += [f"{file.relative_to(site)}: {hit}" for hit in IMPORTED.findall(file.read_text(encoding="utf-8"))]
    assert not found
    assert LOADED.findall('<script src="https://a.example/b.js"></script><link rel=x href=//c.example/d.css>') == [
        ("https://a.example/b.js", ""),
        ("", "//c.example/d.css"),
    ]
