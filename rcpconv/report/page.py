"""Pieces of an HTML page that needs nothing else: text, tables, images, sections. Knows nothing of what they show.

Every function gives well-formed XML, so that a test can parse the whole.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; border-bottom: 1px solid #ddd; }
p { margin: .4rem 0 .8rem; }
.note { color: #555; }
td .note { font-size: 13px; }
img { display: block; width: 100%; height: auto; margin: 1rem 0; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th { font-weight: 600; border-bottom: 1px solid #999; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.plain td { text-align: left; vertical-align: top; }
table.texts { table-layout: fixed; width: 100%; }
table.texts th, table.texts td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; }
table.texts th:first-child { width: 5rem; }
.prompt { color: #777; font-style: italic; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""
_CONTROLS = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: object) -> str:
    """Any text as HTML; characters that HTML cannot hold become U+FFFD."""
    return html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(text)))


def paragraph(text: str, kind: str = "note") -> str:
    """A paragraph of plain text, of the class `kind`."""
    return f'<p class="{kind}">{escape(text)}</p>'


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; its first column is left-aligned, the others hold numbers."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, without headings."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>\n" for name, value in rows)
    return f'<table class="plain"><tbody>\n{body}</tbody></table>'


def image(svg: bytes, description: str) -> str:
    """An SVG image, embedded; the description is for those who do not see it."""
    data = base64.b64encode(svg).decode()
    return f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}" />'


def side_by_side(prompt: str, headings: Sequence[str], rows: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """A prompt, and below it a grid of (text, note) under headings, each row with its name."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("", *headings))
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(
            f'<td><div class="text">{escape(text)}</div><div class="note">{escape(note)}</div></td>'
            for text, note in row
        )
        + "</tr>\n"
        for name, row in rows.items()
    )
    shown = f'<p class="prompt text">…{escape(prompt)}</p>'
    return f'{shown}<table class="texts"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


def folded(title: str, text: str) -> str:
    """Preformatted text behind a title that opens it."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def page(title: str, *sections: str) -> str:
    """The whole page."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" /><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width" /><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
