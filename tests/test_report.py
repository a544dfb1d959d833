"""`python -m cleanrl.utils.report`: its pages and plots, and what a user can get wrong."""

import base64
import dataclasses
import errno
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tyro
from made_runs import QDAGGER, write_run
from matplotlib import image
from matplotlib.figure import Figure

from cleanrl.utils.report import __main__ as report
from cleanrl.utils.report.pages import Bullets, Paragraph, Table, block_to_html, block_to_markdown
from cleanrl.utils.report.pictures import COLORS
from cleanrl.utils.report.runs import find_runs

ROOT = Path(__file__).resolve().parents[1]


def make(*arguments):
    report.main(tyro.cli(report.Args, args=["--bootstrap-samples", "50", *map(str, arguments)]))


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_text_is_shown_as_it_is():
    name = "a|b <i>*x*</i> __y__ [z](w) & \\ `c`"
    assert Tags(block_to_html(Paragraph(name), Path())).texts == [name]
    assert Tags(block_to_html(Table(["head"], [[name]]), Path())).texts.count(name) == 1
    assert block_to_markdown(Bullets([name])) == r"- a\|b \<i>\*x\*\</i> \__y_\_ [z\](w) \& \\ \`c\`"
    assert block_to_markdown(Table(["h"], [["1|2"]])) == "| h |\n| --- |\n| 1\\|2 |"


def test_control_characters_are_escaped_in_pages():
    for text in ("a\x1b[2J", "a\udcff"):  # from files' names; the second cannot be written at all
        assert block_to_html(Paragraph(text), Path()) == f"<p>{ascii(text)[1:-1]}</p>"
        assert block_to_markdown(Paragraph(text)) == ascii(text)[1:-1].replace("\\", "\\\\")


@pytest.fixture(scope="module")
def pong(tmp_path_factory):
    """The report of kept runs on Pong, made as a user makes it."""
    folder = tmp_path_factory.mktemp("reports") / "pong"
    options = ["docs/results/past-teacher/pytorch", "--output", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "cleanrl.utils.report", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_the_report_of_the_kept_runs(pong):
    folder, done = pong
    assert {path.name for path in folder.iterdir()} == {
        "report.md", "report.html", "curves-Pong.png", "comparison-Pong.png", "over-all-games.png"
    }  # fmt: skip
    assert done.stdout == f"report: {folder / 'report.html'}, of 4 runs; 0 left out\n"
    assert not done.stderr
    markdown = (folder / "report.md").read_text("utf-8")
    # As docs/results.md says: of 12.2, 5.9 and 9.6; the teacher's −0.7, −1.7 and −0.9.
    assert re.search(
        r"\| Pong \| past \| 3 \| 120,000 \| 9.23 ± 3.17 \| 10 \| [^|]+ \| −1.10 \| 30 \| 19.72 ± 0.20 \|",
        markdown,
    )
    assert "| Pong | dqn | 1 | 120,000 | −21.00 | 10 | −20.70 | – | – |" in markdown
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (folder / name).is_file()


@pytest.mark.slow
def test_the_page_is_self_contained(pong):
    folder, _ = pong
    text = (folder / "report.html").read_text("utf-8")
    page = Tags(text)
    assert {"script", "link", "iframe", "object", "base", "a"}.isdisjoint(tag for tag, _ in page.tags)
    assert not re.search(r"@import|url\(|https?:", re.sub(r"base64,[^\"]+", "", text))
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
    assert embedded == {path.read_bytes() for path in folder.glob("*.png")}
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert "prefers-color-scheme: dark" in text
    assert "9.23 ± 3.17" in page.texts


def has_color(picture, color):
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (np.abs(picture[:, :, :3] - rgb).max(axis=2) < 0.02).sum() > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "colors"),
    [("curves-Pong", COLORS[:2]), ("comparison-Pong", COLORS[:2]), ("over-all-games", COLORS[:2])],
)
def test_plots_show_every_experiment(pong, name, colors):
    picture = image.imread(pong[0] / f"{name}.png")
    height, width, _ = picture.shape
    assert 900 <= width <= 1600
    assert 400 <= height <= 1600
    assert all(has_color(picture, color) for color in colors)
    assert not has_color(picture, COLORS[2])


def test_a_run_that_finished_no_game(tmp_path):
    offline = [(50, 1.0), (100, 2.0)]
    # What is between two $ is a formula for Matplotlib, but not here.
    options = {"evaluation": (), "eval_episodes": 0} | QDAGGER
    run = write_run(tmp_path / "runs", "q$^$q", teacher=9.0, offline=offline, last_step=200, **options)
    make(tmp_path / "runs", "--output", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "No run has a final evaluation" in text
    assert f"{run.name}: finished 0 games in training, fewer than 10" in text
    assert sorted(path.suffix for path in (tmp_path / "report").iterdir()) == [".html", ".md", ".png"]


@pytest.mark.parametrize("field", dataclasses.fields(report.Args)[1:], ids=lambda field: field.name)
def test_every_option_is_in_the_docs(field):
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    assert f"| `--{field.name.replace('_', '-')}` | {field.default} |" in text


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture
def one_run(tmp_path):
    write_run(tmp_path / "runs", games=[(1, 1.0)])
    return tmp_path / "runs"


@pytest.fixture
def output(tmp_path):
    """An older report."""
    output = tmp_path / "report"
    output.mkdir()
    for name in ("report.html", "report.md", "curves-Pong.png", "comparison-Pong.png", "over-all-games.png"):
        (output / name).write_text("old")
    return output


def error_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_out_is_named_in_the_report_and_on_stderr(one_run, tmp_path, capsys):
    empty = one_run / "PongNoFrameskip-v4__dqn__1__7"
    empty.mkdir()
    make(one_run, "--output", tmp_path / "report")
    captured = capsys.readouterr()
    assert captured.err == f"left out: {empty}: empty: no event files\n"
    assert captured.out == f"report: {tmp_path / 'report' / 'report.html'}, of 1 run; 1 left out\n"
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text("utf-8")
        assert f"{empty}: empty: no event files" in text
        assert "1 folder left out" in text


def test_no_usable_run(tmp_path, capsys):
    assert error_of(tmp_path) == f"error: no usable runs in {tmp_path}: there are none"
    (tmp_path / "PongNoFrameskip-v4__dqn__1__7").mkdir()
    assert error_of(tmp_path) == f"error: no usable runs in {tmp_path}: 1 left out"
    assert capsys.readouterr().err.count("left out: ") == 1
    missing = tmp_path / "no"
    assert error_of(missing) == f"error: {missing} is not a folder; name a run's folder or one above it"
    assert error_of().startswith("error: name at least one folder of runs")
    with pytest.raises(SystemExit, match=r"^error: xxx[^\n]* is not a folder; name a run's"):
        find_runs([Path("x" * 5000)], include_unfinished=False)


def test_what_a_file_says_cannot_move_the_cursor(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path / "runs\x1b[2J", seed=seed, games=[(1, 1.0)], gamma=f"\x1b[2J{seed}")
    make(tmp_path, "--output", tmp_path / "report")
    assert capsys.readouterr().err.splitlines()[-1].endswith(r"--gamma (\x1b[2J1, \x1b[2J2)")
    assert "\x1b" not in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert r"runs\x1b[2J/BreakoutNoFrameskip-v4__dqn__1" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_missing_package(one_run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = error_of(one_run, "--output", tmp_path / "report")
    assert error == f"error: a report needs {package}: pip install -r requirements/requirements-report.txt"


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("last-games", 0, 1), ("bootstrap-samples", 0, 1), ("bootstrap-seed", -1, 0)],
)
def test_invalid_numbers(one_run, option, value, least):
    assert error_of(one_run, f"--{option}", value) == f"error: --{option} {value} must be at least {least}"


def test_an_older_report_is_replaced(one_run, tmp_path, output):
    make(one_run, "--output", output)
    names = {"report.html", "report.md", "curves-Breakout.png", "over-all-games.png"}
    assert {path.name for path in output.iterdir()} == names
    assert not any(path.read_bytes() == b"old" for path in output.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report"}


def test_a_users_own_folder_named_as_a_report_is_not_replaced(one_run, tmp_path):
    (tmp_path / "report" / "report.md").mkdir(parents=True)
    (tmp_path / "report" / "report.md" / "mine.txt").write_text("mine")
    assert "contains report.md, not part of a report" in error_of(one_run, "--output", tmp_path / "report")
    assert (tmp_path / "report" / "report.md" / "mine.txt").read_text() == "mine"


def test_nothing_else_is_replaced(output):
    file = output / "notes.txt"
    file.write_text("mine")
    for folder, fault in {
        output: "contains notes.txt, not part of a report; name another folder",
        file: "is a file; name a folder",
    }.items():  # before the runs are read, which takes longer
        assert error_of("no-such-runs", "--output", folder) == f"error: --output {folder} {fault}"
    assert file.read_text() == "mine"
    assert (output / "report.html").read_text() == "old"


def test_an_output_that_cannot_be_looked_into(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", mock.Mock(side_effect=OSError(errno.EACCES, "Permission denied")))
    error = error_of("no-such-runs", "--output", tmp_path)
    assert error == f"error: --output {tmp_path} cannot be read (Permission denied); name another folder"


def test_a_file_that_appears_meanwhile_is_kept(one_run, tmp_path, monkeypatch):
    file = tmp_path / "report" / "notes.txt"

    def save(figure, path, dpi):
        path.touch()
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")

    monkeypatch.setattr(Figure, "savefig", save)
    assert "contains notes.txt" in error_of(one_run, "--output", file.parent)
    assert file.read_text() == "mine"


def test_a_full_disk_leaves_the_older_report(one_run, tmp_path, output, monkeypatch):
    def fail(figure, path, dpi):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    error = error_of(one_run, "--output", output)
    assert error == f"error: --output {output} cannot be written (No space left on device)"
    assert all(path.read_text() == "old" for path in output.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report"}
