from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from lora_hf.core.formatting import table
from lora_hf.experiments.compare.disagreements import disagreement_section, texts_section
from lora_hf.experiments.compare.markdown import escape, to_html

HOSTILE = [
    "a | b `code` **bold** _it_ ~~x~~ [link](http://example.com) ![p](q.png)",
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; &lt;",
    "two\nlines\r\n\n# title\n> quote\n- item\n| c | d |\u2028end\x00\x1b[31m",
    "\\`\\| back\\slash \\",
    "1. first",
]


def text_of(html: str) -> str:
    """What a reader sees."""
    import html as entities

    return entities.unescape(re.sub(r"<[^>]+>", "", html))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_quoted_text_is_shown_as_it_is(text: str) -> None:
    shown = MarkdownIt("commonmark").enable("table").render(f"**x:** {escape(text)}")
    assert re.fullmatch(r"<p><strong>x:</strong> [^<>]*</p>\n", shown)
    printable = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
    assert text_of(shown).strip() == f"x: {printable}"


def test_a_quoted_text_stays_in_its_cell(tmp_path: Path) -> None:
    found = {
        "name": "test",
        "between": [{"key": "A", "label": "x|y", "seed": 0}, {"key": "B", "label": "z", "seed": 0}],
        "inputs": 9,
        "same": 8,
        "rows": [{"input": HOSTILE[0], "references": HOSTILE[1:3], "more_references": 4, "outputs": HOSTILE[3:]}],
    }
    html = to_html(texts_section(found), "x", tmp_path)
    assert html.count("<td") == 4
    assert "and 4 more" in html
    assert "8 of 9 texts are the same" in html
    assert "<script" not in html
    assert "<img" not in html


def test_rows_that_disagree_are_quoted_and_nothing_in_them_is_taken(tmp_path: Path) -> None:
    row = {"row": 17, "label": "yes", "answers": ["yes", "no_way"], "texts": dict(zip("abcde", HOSTILE, strict=True))}
    found = {
        "split": "validation",
        "between": [{"key": "A", "label": "head", "seed": 3}, {"key": "A", "label": "head", "seed": 4}],
        "counts": {"both": 1, "only_first": 2, "only_second": 3, "neither": 4},
        "rows": {"only_first": [row], "only_second": [], "neither": []},
        "without_texts": None,
    }
    html = to_html(disagreement_section(found), "x", tmp_path)
    assert "A3 (head, seed 3) versus A4 (head, seed 4), on validation." in html
    assert "Row 17, label yes: A3 predicts yes, A4 predicts no_way." in html
    assert html.count("<blockquote>") == 1
    assert html.count("<strong>") == 1 + len(HOSTILE), "the heading of the list, and the names of the columns"
    assert not re.search(r"<(script|img|h1|li|em|code|a) ?", html)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG picture")
    markdown = f"# Title\n\n![alt words](a.png)\n\n{table(['a', 'b'], [['x', '1']])}\n\n<b>not taken</b>\n"
    html = to_html(markdown, "T & <t>", tmp_path)
    assert html.startswith("<!DOCTYPE html>")
    assert "<title>T &amp; &lt;t&gt;</title>" in html
    assert '<img src="data:image/png;base64,iVBORyBwaWN0dXJl' in html
    assert 'alt="alt words"' in html
    assert re.search(r'<div class="scroll"><table>.*</table></div>', html, re.DOTALL)
    assert "&lt;b&gt;not taken&lt;/b&gt;" in html
    for outside in ("http", "<script", "<link", "@import", "url(", 'src="a.png"'):
        assert outside not in html


def test_a_picture_of_a_task_with_a_name_beyond_ascii_is_found(tmp_path: Path) -> None:
    (tmp_path / "phân_loại-curves.png").write_bytes(b"a picture")
    assert "data:image/png;base64," in to_html("![](phân_loại-curves.png)", "t", tmp_path)
