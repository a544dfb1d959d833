"""What README and docs say of options and curves is true, and every command in them can be run."""

import dataclasses
import re
import shlex
import subprocess
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import ModuleType
from typing import Any, NamedTuple

import docs_commands
import pytest
from both_scripts import DQN_JAX, DQN_TORCH, JAX, ROOT, TORCH, name_of
from docs_commands import MARKS, PAGES, SCRIPTS, Block, Place, fences, rule_for

from cleanrl.utils.command_line import describe_options
from cleanrl.utils.run.charts import CHARTS, DQN_CHARTS, EVALUATION_RETURN, FINAL_RETURN, TAGS

BLOCKS = docs_commands.read_pages(PAGES)
COMMANDS = sorted({words for block in BLOCKS for words in block.commands})
UNMARKED = {words for block in BLOCKS for words in block.commands if block.mark is None}
TO_RUN = docs_commands.to_run(BLOCKS)


def test_every_script_has_commands():
    assert {words[1] for words in UNMARKED if len(words) > 1} >= {f"cleanrl/{name}" for name in SCRIPTS}


@pytest.mark.parametrize("page", PAGES, ids=docs_commands.name_of)
def test_commands_stand_where_the_tests_find_them(page):
    text = page.read_text("utf-8")
    assert not re.search(r"^( +```| *~~~)", text, re.MULTILINE), "blocks are ``` at the start of a line"
    for line, info, content in fences(text):
        where = f"{docs_commands.name_of(page)}:{line}"
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
def test_every_command_is_one_that_can_be_tried(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no runs are
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
    """The outcome of each block, by its name. Two run at a time."""
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


@pytest.mark.slow
@pytest.mark.parametrize("block", TO_RUN, ids=[block.name for block in TO_RUN])
def test_commands_run(block, outcomes):
    if error := outcomes[block.name].exception():
        # Not raised: pytest would parse code while another thread may be doing so, which Python 3.11 cannot.
        pytest.fail("".join(traceback.format_exception(error)), pytrace=False)


class Row(NamedTuple):
    """An option's row in a table, below the heading of its group."""

    group: str
    option: str
    default: Any
    meaning: str


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    level = len(heading.split()[0])
    [_, below] = re.split(rf"^{re.escape(heading)}$", text, flags=re.MULTILINE)
    return re.split(rf"^#{{1,{level}}} ", below, maxsplit=1, flags=re.MULTILINE)[0]


def documented_options(page: str, script: ModuleType) -> list[Row]:
    text = section(page, "### Options")
    in_jax = dict(re.findall(r"In the JAX script,\s+`--([\w-]+)` is `(\w+)` by\s+default", text))
    defaults = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(script.Args)}
    group, rows = "", []
    for line in text.splitlines():
        if line.startswith("#### "):
            group = line.removeprefix("#### ")
        elif row := re.fullmatch(r"\| `--(\S+)` \| (.+?) \| (.+) \|", line):
            option, default, meaning = row.groups()
            if script in (JAX, DQN_JAX):
                default = in_jax.get(option, default)
            if default == "the script's name":
                default = name_of(script)
            rows.append(Row(group, option, as_value(default, like=defaults[option]), meaning))
    return rows


def as_value(default: str, like: Any) -> Any:
    """A default as a page writes it, in the type of the real one."""
    if like is None or isinstance(like, bool):
        return {"–": None, "True": True, "False": False}[default]
    return type(like)(default)


@pytest.mark.parametrize(
    ("page", "script"),
    [("qdagger.md", TORCH), ("qdagger.md", JAX), ("dqn.md", DQN_TORCH), ("dqn.md", DQN_JAX)],
    ids=map(name_of, (TORCH, JAX, DQN_TORCH, DQN_JAX)),
)
def test_every_option_is_in_the_docs_once_with_its_group_default_and_meaning(page, script):
    options = describe_options(script.Args)
    expected = [
        Row(options[field.name].group, field.name.replace("_", "-"), field.default, options[field.name].help)
        for field in dataclasses.fields(script.Args)
    ]
    assert sorted(documented_options(page, script), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(("page", "charts"), [("qdagger.md", CHARTS), ("dqn.md", DQN_CHARTS)])
def test_every_curve_is_in_the_docs_once(page, charts):
    in_charts = {tag for of_section in charts.values() for tags in of_section.values() for tag in tags}
    by_themselves = {"charts/episodic_length", EVALUATION_RETURN, FINAL_RETURN}
    if charts is CHARTS:
        assert in_charts | by_themselves == TAGS.keys()
    first_cells = re.findall(r"^\| (`.*?) \|", section(page, "## Metrics"), re.MULTILINE)
    documented = re.findall(r"`((?:charts|losses|eval)/.*?)`", " ".join(first_cells))
    assert sorted(documented) == sorted(in_charts | by_themselves)
