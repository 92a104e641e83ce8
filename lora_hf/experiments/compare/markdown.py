"""Markdown as the report uses it: escaped texts, and the conversion to one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from urllib.parse import unquote

SPECIAL = re.compile(r"([\\`*_\[\]<>|#&~$!])")
STYLE = Path(__file__).with_name("report.css")


def escape(text: str) -> str:
    """The text on one line, without control characters, so that Markdown shows it literally."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return SPECIAL.sub(r"\\\1", " ".join(printable.split()))


def to_html(markdown: str, title: str, folder: Path) -> str:
    """An HTML page without scripts or links to other files: the images, read from `folder`, are embedded.

    HTML in the Markdown is escaped, because it comes from data.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    # A wide table scrolls by itself; the page does not.
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                image = base64.b64encode((folder / unquote(str(child.attrs["src"]))).read_bytes()).decode("ascii")
                child.attrs["src"] = f"data:image/png;base64,{image}"
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
