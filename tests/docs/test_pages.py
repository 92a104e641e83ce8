"""What holds the pages together: navigation, links, what is not run and why, and a translation beside its page."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.support.numbers_in_records import NOT_SAID
from tests.support.pages import PAGES, REPO, RUN, Block, anchors, blocks, headings, links, page_name
from tools.report import MARKER

DOCS = REPO / "docs"
TRANSLATED = [page for page in PAGES if page.name.endswith(".vi.md")]
# Pages of the site that no file of docs/ holds: .ci/mkdocs_hooks.py brings them.
BROUGHT = {"index.md", "contributing.md", "changelog.md", "reference/index.md", "reference/*"}
# Why a block may stand on a page without being run.
REASONS = (
    "installs",  # packages: needs an index
    "needs the hub",
    "needs a GPU",
    "needs several machines",
    "needs another program",
    "needs a person",  # who reads, or presses a key
    "runs for",  # minutes and more; the reason names the test that runs it small
    "is this suite",
)
# A time is measured where something takes it; otherwise it may be a limit that the code sets.
MEASURED = re.compile(
    r"(?<![\w.])\d[\d,]*(?:\.\d+)?\s?(?:%|×|(?:x|times|[KMG]B|examples/s|tokens/s|points|percent)\b)"
    r"|(?:takes|took|needs|needed|lasts|lasted)\s(?:about\s)?\d[\d,]*(?:\.\d+)?\s?(?:ms|s|seconds?|minutes?|min|hours?)\b"
)


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without what its tags would call."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def navigation() -> list[str]:
    """The pages that mkdocs.yml names."""

    def flat(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [page for inner in entry.values() for page in flat(inner)]
        return [page for each in entry for page in flat(each)] if isinstance(entry, list) else [str(entry)]

    return flat(yaml.load((REPO / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"])


def test_every_page_is_in_the_navigation_once() -> None:
    named = navigation()
    assert len(named) == len(set(named))
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    pages |= {page.relative_to(DOCS).with_suffix(".md").as_posix() for page in DOCS.rglob("*.ipynb")}
    missing = {page for page in pages if not page.endswith(".vi.md")} - set(named)
    assert not missing, f"add to nav in mkdocs.yml: {sorted(missing)}"
    assert set(named) >= BROUGHT


def problem_of(page: Path, target: str) -> str | None:
    """What is wrong with a link of the page; an address elsewhere is looked at, not asked."""
    parts = urlsplit(target)
    if parts.scheme:
        fine = parts.scheme in ("https", "mailto") and bool(parts.netloc or parts.path) and " " not in target
        return None if fine else "expected https://"
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not file.exists():
        return "no such file"
    if not file.is_relative_to(REPO):
        return "leads out of the repository"
    if parts.fragment and (file.suffix != ".md" or unquote(parts.fragment) not in anchors(file)):
        return f"no such heading; there are {', '.join(sorted(anchors(file))) if file.suffix == '.md' else 'none'}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    wrong = [
        f"{page_name(page)}:{line} {target}: {problem}"
        for line, target in links(page)
        if (problem := problem_of(page, target))
    ]
    assert not wrong


def test_a_wrong_link_is_found() -> None:
    page = DOCS / "adapters.md"
    for target, problem in {
        "results.md#speed": None,
        "../README.md": None,
        "results/suite/tiny-roberta.json": None,
        "https://example.org/page#part": None,
        "#saving": None,
        "#saved": "no such heading; there are adapters, ",
        "results.md#sped": "no such heading",
        "nowhere.md": "no such file",
        "../../elsewhere": "no such file",
        "http://example.org": "expected https://",
    }.items():
        found = problem_of(page, target)
        assert found == problem if problem is None else (found or "").startswith(problem), target


def test_anchors_are_those_of_github() -> None:
    page = DOCS / "adapters.md"
    for words, slug in {
        "Rows of one batch, under `LoRA`": "rows-of-one-batch-under-lora",
        "SST-2: what is (not) there?": "sst-2-what-is-not-there",
        "Lưu và nạp lại": "lưu-và-nạp-lại",
        "a_b & c": "a_b--c",
    }.items():
        assert anchors(page, f"# {words}\n") == {slug}
    assert anchors(page, "# One\n## One\n") == {"one", "one-1"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_is_not_run_says_why(page: Path) -> None:
    wrong = [
        f"{block}: {block.not_run!r}"
        for block in blocks(page)
        if block.not_run is not None and (block.language not in RUN or not block.not_run.startswith(REASONS))
    ]
    assert not wrong, f"expected a block of bash or Python, and a reason that begins with one of {REASONS}"
    marks = re.findall(r"(?m)^ *<!-- not run", page.read_text(encoding="utf-8"))
    assert len(marks) == sum(block.not_run is not None for block in blocks(page)), (
        "a mark stands directly before its block"
    )


def test_most_blocks_run() -> None:
    pages = [page for page in PAGES if page not in TRANSLATED]
    code = [block for page in pages for block in blocks(page) if block.language in RUN and not block.hidden]
    not_run = [block for block in code if block.not_run is not None]
    listed = "\n".join(f"{block}: {block.not_run}" for block in not_run)
    print(f"{len(code) - len(not_run)} of {len(code)} blocks run; not run:\n{listed}")
    assert len(not_run) < len(code) / 3, listed


def test_marks_and_hidden_blocks_are_read() -> None:
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


def without_comments(block: Block) -> tuple[str, str]:
    """Its language, and its text without what a translation may change."""
    return block.language, re.sub(r"(?m)(^|\s+)# .*$", "", block.text)


@pytest.mark.parametrize("page", TRANSLATED, ids=page_name)
def test_a_translation_has_the_code_and_the_parts_of_its_page(page: Path) -> None:
    english = page.with_name(page.name.replace(".vi.md", ".md"))
    assert english.is_file(), "a translation stands beside its page"
    ours, theirs = ([block for block in blocks(each) if not block.hidden] for each in (page, english))
    assert [without_comments(block) for block in ours] == [without_comments(block) for block in theirs]
    assert [block.not_run for block in ours] == [block.not_run for block in theirs]
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(english)]
    text, original = page.read_text(encoding="utf-8"), english.read_text(encoding="utf-8")
    assert [match["name"] for match in MARKER.finditer(text)] == [match["name"] for match in MARKER.finditer(original)]


def test_a_translated_comment_is_no_difference_and_code_is() -> None:
    page = DOCS / "page.md"
    ours, theirs, other = (
        without_comments(Block(page, 1, "bash", text))
        for text in (
            "make demo   # trains #1\n# a line\n",
            "make demo   # huấn luyện\n# một dòng\n",
            "make test   # trains\n\n",
        )
    )
    assert ours == theirs
    assert ours != other
    assert without_comments(Block(page, 1, "python", 'a = "#b"\n')) == ("python", 'a = "#b"\n')


@pytest.mark.parametrize(
    "page", [page for page in PAGES if not MARKER.search(page.read_text(encoding="utf-8"))], ids=page_name
)
def test_a_page_without_records_says_no_measured_number(page: Path) -> None:
    assert not measured(page.read_text(encoding="utf-8")), "render it from a record, see tools/report.py"


def measured(text: str) -> list[str]:
    """The numbers with a unit of a measurement that stand in the sentences of a page."""
    for pattern in (*NOT_SAID, re.compile(r"`[^`\n]*`")):
        text = pattern.sub(" ", text)
    return MEASURED.findall(text)


def test_a_measured_number_is_found() -> None:
    said = "It is 3.5x as fast, takes 20 s, 1,024 MB and 7 % of `9 s`."
    assert measured(said) == ["3.5x", "takes 20 s", "1,024 MB", "7 %"]
    assert measured("Three of 8 adapters end after 30 seconds with exit code 2, as in 2106.09685; r=16.") == []
