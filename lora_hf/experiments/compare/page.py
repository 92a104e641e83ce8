"""`report.html`: the report as one file that needs nothing else: no picture beside it, no script, no net."""

from __future__ import annotations

import base64
import html
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --paper: #fdfdfc; --line: #d9dbe0; --soft: #f2f3f5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --line: #383c44; --soft: #20242a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.45rem; margin: 3.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
p, ul { max-width: 46rem; }
p:has(img) { max-width: 60rem; }
li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { min-width: 2rem; }
td[style*="right"] { white-space: nowrap; }
th { background: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody tr:hover { background: var(--soft); }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
blockquote { margin: .3rem 0 1.1rem; padding: .4rem 1rem; border-left: 3px solid var(--line); background: var(--soft);
  max-width: 52rem; }
blockquote p { margin: 0; max-width: none; }
code { background: var(--soft); padding: .1em .3em; border-radius: 3px; }
@media print { main { max-width: none; } h3, img { break-after: avoid; } img { break-inside: avoid; } }
"""


def page(markdown: str, title: str, pictures: Path) -> str:
    """The HTML page of a Markdown report, the pictures of that folder inside it.

    HTML in the Markdown is shown, not taken: the texts of data rows stay texts.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    # A wide table scrolls in a box of its own, and the page does not.
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                child.attrs["src"] = _inlined(pictures / str(child.attrs["src"]))
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _inlined(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode('ascii')}"
