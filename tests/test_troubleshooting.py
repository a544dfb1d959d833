"""docs/troubleshooting.md names the error lines that there are: all of them, and no others."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHER_PAGES = ("report", "benchmark", "tune")  # packages whose errors their own pages explain
ENOUGH = 20  # letters by which a line can be told from others


def text_of(node: ast.expr | None) -> str:
    """A string of the source, with … for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return text_of(left) + text_of(right)
    return "…"


def trees() -> list[ast.Module]:
    paths = sorted((ROOT / "cleanrl").rglob("*.py"))
    return [ast.parse(path.read_text("utf-8")) for path in paths if not set(OTHER_PAGES) & set(path.parts)]


def messages() -> Iterator[str]:
    """What `SystemExit` and `BadWeightsError` are raised with, and `refuse` called with."""
    for node in itertools.chain.from_iterable(map(ast.walk, trees())):
        match node:
            case ast.Call(func=ast.Name(id="SystemExit"), args=[message]):
                yield text_of(message)
            case ast.Call(func=ast.Name(id="BadWeightsError"), args=[message]):
                yield f"error: … {text_of(message)}"
            case ast.Call(func=ast.Name(id="refuse"), args=[option, _, demand]):
                yield f"error: --{text_of(option).replace('_', '-')} … {text_of(demand)}"


def lines_of_the_page() -> list[list[str]]:
    """The fixed parts of each."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("|")]
    return [line.split("…") for cell in cells for line in re.findall("`([^`]+)`", cell) if " " in line]


def test_every_error_line_is_explained():
    lines = [re.compile(".*".join(map(re.escape, parts))) for parts in lines_of_the_page()]
    unexplained = [
        message
        for message in messages()
        if len(re.sub("[^a-z]", "", message)) >= ENOUGH and not any(line.search(message) for line in lines)
    ]
    assert unexplained == []


def test_every_line_that_is_explained_can_come():
    strings = [text_of(node) for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.expr)]
    texts = "\n".join([*filter("…".__ne__, strings), *messages()])
    gone = [part for parts in lines_of_the_page() for part in parts if part.strip(" ;,") not in texts]
    assert gone == []
