"""What README and docs say of the command line is true, and every command in them can be run."""

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import docs_commands
import pytest
from docs_commands import MARKS, PAGES, ROOT, SCRIPTS, Block, Place, fences, rule_for

from cleanrl import dqn_atari, qdagger_dqn_atari_impalacnn

OPTIONS = [
    (page, script, field)
    for page, script in (("qdagger.md", qdagger_dqn_atari_impalacnn), ("dqn.md", dqn_atari))
    for field in dataclasses.fields(script.Args)
]
BLOCKS = docs_commands.read_pages(PAGES)
COMMANDS = sorted({words for block in BLOCKS for words in block.commands})
UNMARKED = {words for block in BLOCKS for words in block.commands if block.mark is None}
TO_RUN = docs_commands.to_run(BLOCKS)


def test_every_script_has_commands():
    assert {words[1] for words in UNMARKED if len(words) > 1} >= {f"cleanrl/{name}" for name in SCRIPTS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_where_the_tests_find_them(page):
    text = page.read_text("utf-8")
    assert not re.search(r"^( +```| *~~~)", text, re.MULTILINE), "blocks are ``` at the start of a line"
    for line, info, content in fences(text):
        where = f"{page.name}:{line}"
        if info.startswith("bash"):
            title = docs_commands.TITLE.fullmatch(info)
            assert title, f'{where}: write bash, or bash title="…"'
            assert title["title"] is None or title["title"] in MARKS, f"{where}: the title is none of {MARKS}"
        else:
            assert info in ("text", "python"), f"{where}: commands stand in bash blocks"
            assert not re.search(r"^(\$ |python |pip |poetry )", content, re.MULTILINE), where


def test_ci_takes_the_tests_from_the_second_block_of_the_readme():
    program = re.search(r"awk '(.+)'", (ROOT / ".ci" / "run").read_text("utf-8"))[1]
    taken = subprocess.run(["awk", program, ROOT / "README.md"], capture_output=True, text=True, check=True)
    plain = [
        content for _, info, content in fences((ROOT / "README.md").read_text("utf-8")) if info == "bash"
    ]
    assert taken.stdout == plain[1]
    assert plain[1].count("\n") == 1
    assert " -m pytest " in plain[1]


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_every_command_is_one_that_can_be_tried(words):
    try:
        rule = rule_for(words)
    except LookupError:
        is_marked = words not in UNMARKED
        assert is_marked, f"""no rule of tests/docs_commands.py tries {shlex.join(words)}
            Write one, or mark the block with one of the titles {sorted(MARKS)}."""
        return
    rule.check(list(words))
    assert rule.run or rule.why_not


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """What came of each block, by its name. Two run at a time."""
    folder = tmp_path_factory.mktemp("docs")
    checkout = docs_commands.make_checkout(folder)
    selected = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    with ExitStack() as stack:
        hubs = docs_commands.start_hubs(stack)
        pool = ThreadPoolExecutor(2)
        stack.callback(pool.shutdown, cancel_futures=True)
        futures: dict[str, Future] = {}
        sources: dict[Place, Future] = {}

        def run(block: Block, place: Place) -> None:
            wait(sources[source] for source in place.sources)
            docs_commands.run_block(block, place)

        for number, block in enumerate(TO_RUN):
            if block.saves_replay or block.name in selected:
                usable = () if block.saves_replay else tuple(sources)
                place = Place(folder / str(number), checkout, hubs, usable)
                futures[block.name] = pool.submit(run, block, place)
                if block.saves_replay:
                    sources[place] = futures[block.name]
        yield futures


@pytest.mark.parametrize("block", TO_RUN, ids=[block.name for block in TO_RUN])
def test_commands_run(block, outcomes):
    outcomes[block.name].result()


@pytest.mark.parametrize(
    ("page", "script", "field"), OPTIONS, ids=[f"{page}-{field.name}" for page, _, field in OPTIONS]
)
def test_every_option_stands_in_the_docs_with_its_default(page, script, field):
    text = (ROOT / "docs" / page).read_text("utf-8")
    (row,) = re.findall(rf"^\| `--{field.name.replace('_', '-')}[ `].*$", text, re.MULTILINE)
    default = row.split(" | ")[1].replace("_", "")
    if field.name == "exp_name":
        assert field.default == Path(script.__file__).stem
    elif field.default is None:
        assert default == "–"
    elif isinstance(field.default, float):
        assert float(default) == field.default
    else:
        assert default == str(field.default).replace("_", "")
