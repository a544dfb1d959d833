"""A report's text and its two forms: Markdown beside the plots, and one HTML page that contains them."""

import base64
import re
from collections.abc import Sequence
from html import escape as escape_html
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from cleanrl.utils.bounds import printable


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    text: str


class Bullets(NamedTuple):
    items: list[str]


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]


class Picture(NamedTuple):
    file_name: str
    description: str


NONE = "–"  # in a cell without a value

Block = Heading | Paragraph | Bullets | Table | Picture

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --line: #cccccc; --head: #f2f2f2; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e4e4e4; --page: #16181c; --line: #44474d; --head: #24272d; }}
}}
body {{ margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; }}
p, ul {{ max-width: 50rem; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }}
th {{ background: var(--head); }}
td {{ white-space: nowrap; }}
figure {{ margin: 1.5rem 0; }}
img {{ max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(block_to_markdown, blocks)) + "\n"


def block_to_markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escape_markdown(text)}"
        case Paragraph(text):
            return escape_markdown(text)
        case Bullets(items):
            return "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Picture(file_name, description):
            return f"![{escape_markdown(description)}]({quote(file_name)})"
        case Table(head, rows):
            lines = [head, ["---"] * len(head), *([escape_markdown(cell) for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    return escape_html(printable(text))


def escape_markdown(text: str) -> str:
    text = printable(text)
    return re.sub(r"([\\`*<|&]|\](?=\()|(?<!\w)_|_(?!\w))", r"\\\1", text)


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """One self-contained page; the pictures are read from `folder`."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(block_to_html(block, folder) for block in blocks)
    return PAGE.format(title=escape(title), body=body)


def block_to_html(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"
        case Picture(file_name, description):
            data = base64.b64encode((folder / file_name).read_bytes()).decode()
            return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(description)}"></figure>'
        case Table(head, rows):
            lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
            lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
            table = "\n".join(f"<tr>{line}</tr>" for line in lines)
            return f'<div class="table"><table>\n{table}\n</table></div>'
