"""Every page is in the navigation, its links work, skipped blocks have a reason, and translations match."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.support.numbers_in_records import NOT_PROSE
from tests.support.pages import PAGES, REPO, RUN, Block, anchors, blocks, headings, links, page_name
from tools.report import MARKER

DOCS = REPO / "docs"
ENGLISH = [page for page in PAGES if not page.name.endswith(".vi.md")]
TRANSLATIONS = [page for page in PAGES if page.name.endswith(".vi.md")]
# Pages that .ci/mkdocs_hooks.py adds to the site; docs/ does not contain them.
ADDED_PAGES = {"index.md", "contributing.md", "security.md", "changelog.md", "reference/index.md", "reference/*"}
# How the reason for skipping a block may begin.
REASONS = (
    "installs",  # packages: needs an index
    "needs the hub",
    "needs a GPU",
    "needs several machines",
    "needs another program",
    "needs a person",  # who reads, or presses a key
    "runs for",  # minutes or more; the reason names the test that runs it with less work
    "is this suite",
)
# A number with the unit of a measurement. Plain times may be limits in the code, so they count only after these verbs.
MEASURED = re.compile(
    r"(?<![\w.])\d[\d,]*(?:\.\d+)?\s?(?:%|×|(?:x|times|[KMG]B|examples/s|tokens/s|points|percent)\b)"
    r"|(?:takes|took|needs|needed|lasts|lasted)\s(?:about\s)?\d[\d,]*(?:\.\d+)?\s?(?:ms|s|seconds?|minutes?|min|hours?)\b"
)

# Navigation


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml and ignores its tags, which would call functions."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def navigation() -> list[str]:
    def flat(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [page for inner in entry.values() for page in flat(inner)]
        return [page for each in entry for page in flat(each)] if isinstance(entry, list) else [str(entry)]

    return flat(yaml.load((REPO / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"])


def test_every_page_is_in_the_navigation_once() -> None:
    pages = [page for page in ENGLISH if page.is_relative_to(DOCS)] + sorted(DOCS.rglob("*.ipynb"))
    expected = ADDED_PAGES | {page.relative_to(DOCS).with_suffix(".md").as_posix() for page in pages}
    assert sorted(navigation()) == sorted(expected)


# Links


def problem_with_link(page: Path, target: str) -> str:
    """Why a link of the page is wrong, or an empty string. Web addresses are parsed, but not requested."""
    parts = urlsplit(target)
    if parts.scheme:
        valid = parts.scheme in ("https", "mailto") and bool(parts.netloc or parts.path) and " " not in target
        return "" if valid else "expected https://"
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not file.exists():
        return "no such file"
    if not file.is_relative_to(REPO):
        return "leaves the repository"
    known = anchors(file) if file.suffix == ".md" else set()
    if parts.fragment and unquote(parts.fragment) not in known:
        return f"no such heading; there are: {', '.join(sorted(known))}"
    return ""


def test_links_work() -> None:
    problems = [
        f"{page_name(page)}:{line} {target}: {problem}"
        for page in PAGES
        for line, target in links(page)
        if (problem := problem_with_link(page, target))
    ]
    assert not problems


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("../README.md", ""),
        ("results/suite/tiny-roberta.json", ""),
        ("https://example.org/page#part", ""),
        ("#adapters", ""),
        ("#no-such-part", "no such heading"),
        ("results.md#no-such-part", "no such heading"),
        ("nowhere.md", "no such file"),
        ("../..", "leaves the repository"),
        ("http://example.org", "expected https://"),
    ],
)
def test_wrong_links_are_found(target: str, problem: str) -> None:
    found = problem_with_link(DOCS / "adapters.md", target)
    assert found.startswith(problem) if problem else not found


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Rows of one batch, under `LoRA`", "rows-of-one-batch-under-lora"),
        ("SST-2: what is (not) there?", "sst-2-what-is-not-there"),
        ("Lưu và nạp lại", "lưu-và-nạp-lại"),
        ("a_b & c", "a_b--c"),
    ],
)
def test_anchors_match_those_of_github(heading: str, anchor: str) -> None:
    page = DOCS / "page.md"
    assert anchors(page, f"# {heading}\n") == {anchor}
    assert anchors(page, f"# {heading}\n## {heading}\n") == {anchor, f"{anchor}-1"}


# Code blocks


def test_a_block_that_is_not_run_has_a_reason() -> None:
    for page in PAGES:
        skipped = [block for block in blocks(page) if block.not_run is not None]
        wrong = [f"{block}: {block.not_run}" for block in skipped if not block.not_run.startswith(REASONS)]
        assert not wrong, f"a reason begins with one of {REASONS}"
        assert all(block.language in RUN for block in skipped), page
        comments = re.findall(r"(?m)^ *<!-- not run", page.read_text(encoding="utf-8"))
        assert len(comments) == len(skipped), f"{page}: put the comment directly before its block"


def test_most_blocks_run() -> None:
    code = [block for page in ENGLISH for block in blocks(page) if block.language in RUN and not block.hidden]
    skipped = [f"{block}: {block.not_run}" for block in code if block.not_run is not None]
    assert len(skipped) < len(code) / 3, "\n".join(skipped)


def test_comments_before_blocks_are_read() -> None:
    text = """# Page

<!-- before: bash
one
-->

```bash
two
```

<!-- not run: needs the hub, for its weights -->
```bash
three
```

<!-- not run: needs a GPU -->

Text between.

- in a list

  <!-- not run: installs -->
  ```bash
  four
  ```

```yaml
five: 5
```
"""
    found = blocks(DOCS / "page.md", text)
    assert [(block.line, block.language, block.text, block.not_run, block.hidden) for block in found] == [
        (3, "bash", "one\n", None, True),
        (7, "bash", "two\n", None, False),
        (12, "bash", "three\n", "needs the hub, for its weights", False),
        (23, "bash", "four\n", "installs", False),
        (27, "yaml", "five: 5\n", None, False),
    ]
    assert str(found[1]) == "docs/page.md:7"


# Translations


def without_comments(block: Block) -> tuple[str, str]:
    """Language and text of a block; a translation may change the comments of the code."""
    return block.language, re.sub(r"(?m)(^|\s+)# .*$", "", block.text)


@pytest.mark.parametrize("page", TRANSLATIONS, ids=page_name)
def test_a_translation_has_the_code_and_the_parts_of_its_page(page: Path) -> None:
    english = page.with_name(page.name.replace(".vi.md", ".md"))
    assert english.is_file(), f"there is no {page_name(english)}"
    ours, theirs = ([block for block in blocks(each) if not block.hidden] for each in (page, english))
    assert [without_comments(block) for block in ours] == [without_comments(block) for block in theirs]
    assert [block.not_run for block in ours] == [block.not_run for block in theirs]
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(english)]
    text, original = page.read_text(encoding="utf-8"), english.read_text(encoding="utf-8")
    assert [match["name"] for match in MARKER.finditer(text)] == [match["name"] for match in MARKER.finditer(original)]


def test_a_translation_may_change_comments_but_no_code() -> None:
    english, translated, other = (
        without_comments(Block(DOCS / "page.md", 1, "bash", text))
        for text in (
            "make demo   # trains #1\n# a line\n",
            "make demo   # huấn luyện\n# một dòng\n",
            "make test   # trains\n\n",
        )
    )
    assert english == translated
    assert english != other
    assert without_comments(Block(DOCS / "page.md", 1, "python", 'a = "#b"\n')) == ("python", 'a = "#b"\n')


# Numbers


def measured_numbers(text: str) -> list[str]:
    """The numbers in the prose of a page that have the unit of a measurement."""
    for pattern in (*NOT_PROSE, re.compile(r"`[^`\n]*`")):
        text = pattern.sub(" ", text)
    return MEASURED.findall(text)


def test_a_page_without_tables_has_no_measured_numbers() -> None:
    """tests/tools/test_report.py checks the numbers of the other pages."""
    texts = {page_name(page): page.read_text(encoding="utf-8") for page in PAGES}
    found = {page: measured_numbers(text) for page, text in texts.items() if not MARKER.search(text)}
    assert {page: numbers for page, numbers in found.items() if numbers} == {}, "render it, see tools/report.py"


def test_a_measured_number_is_found() -> None:
    text = "It is 3.5x as fast, takes 20 s, 1,024 MB and 7 % of `9 s`."
    assert measured_numbers(text) == ["3.5x", "takes 20 s", "1,024 MB", "7 %"]
    assert not measured_numbers("Three of 8 adapters end after 30 seconds with exit code 2, as in 2106.09685; r=16.")
