"""cleanrl.utils.tune with runs that learn nothing, but whose returns are known."""

import dataclasses
import errno
import json
import os
import shlex
import signal
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import optuna
import pytest
from both_scripts import ROOT, run_python, start_python
from matplotlib import image
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sqlalchemy.exc import OperationalError

from cleanrl.utils.command_line import describe_options
from cleanrl.utils.report.events import UnusableError
from cleanrl.utils.tune import trials
from cleanrl.utils.tune.__main__ import Args, main
from cleanrl.utils.tune.results import draw, table
from cleanrl.utils.tune.space import parse_space
from cleanrl.utils.tune.trials import open_study, using

COMMAND = f"python {shlex.quote(str(ROOT / 'tests' / 'fake_training.py'))} --eval-episodes 2"
SEARCH = ["-m", "cleanrl.utils.tune", "--env-id", "PongNoFrameskip-v4", "--study", "pong"]


def options(*words: str, command: str = COMMAND, search: str = "quality=-5:5") -> list[str]:
    return [*SEARCH, "--command", command, "--search", *search.split(), *words]


def study_in(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="pong", storage=f"sqlite:///{folder}/runs/tune/pong.db")


@pytest.mark.slow
def test_a_search_finds_what_is_best_and_shows_it(tmp_path):
    words = options("--trials", "8", "--workers", "2", search="quality=-5.0:5.0 step-s=0.001:0.01:log")
    status, output, errors = run_python(tmp_path, *words)
    assert status == 0, errors
    study = study_in(tmp_path)
    assert len(study.trials) == 8
    for trial in study.trials:
        assert trial.params.keys() == {"quality", "step-s"}
        value = trial.value if trial.state.name == "COMPLETE" else trial.intermediate_values[10]
        assert value == pytest.approx(trial.params["quality"], rel=1e-6)  # its run had those options
    best, *_ = [line.split() for line in output.splitlines() if " complete " in line]
    assert (best[0], float(best[2].replace("−", "-"))) == (
        str(study.best_trial.number),
        pytest.approx(study.best_value, abs=0.01),
    )
    assert image.imread(tmp_path / "runs" / "tune" / "pong.png").shape[1] > 700


def test_the_table_has_finished_trials_first_and_the_best_of_them_on_top():
    study = optuna.create_study(direction="maximize")
    study.set_user_attr("search", {"quality": [-5, 50]})
    for state, value in (
        ("COMPLETE", -5.0),
        ("PRUNED", 50.0),
        ("COMPLETE", 0.0),
        ("FAIL", None),
        ("COMPLETE", 3.0),
    ):
        reported = {1: value} if state == "PRUNED" else {}
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=None if reported else value,
                intermediate_values=reported,
                params={"quality": 1},
                distributions={"quality": IntDistribution(-5, 50)},
            )
        )
    assert [line.split()[2] for line in table(study)] == ["return", "3.00", "0.00", "−5.00", "50.00", "–"]


def test_event_files_that_take_long_to_read_are_seldom_read_but_always_at_the_end(monkeypatch):
    readings = []

    def slow_reading(files: list, faults: list) -> None:
        readings.append(time.sleep(0.05))
        raise UnusableError

    monkeypatch.setattr(trials, "read_curves", slow_reading)
    job = mock.MagicMock()
    job.record.state = "stopped"
    runner = SimpleNamespace(running={job: None}, waiting=[])
    attempt = trials.Attempt(mock.Mock(), job)
    assert not any(attempt.follow(runner) for _ in range(20))
    assert len(readings) == 1
    runner.running.clear()
    assert attempt.follow(runner)
    assert len(readings) == 2


@pytest.mark.slow
def test_a_run_that_does_worse_than_others_is_pruned(tmp_path):
    """Of six values tried one by one, the worst come last."""
    optuna.create_study(storage=f"sqlite:///{tmp_path}/pong.db", study_name="pong", direction="maximize")
    (tmp_path / "runs" / "tune").mkdir(parents=True)
    (tmp_path / "pong.db").rename(tmp_path / "runs" / "tune" / "pong.db")
    study = study_in(tmp_path)
    for quality in (3, 4, 5, -4, -5):
        study.enqueue_trial({"quality": quality})
    slow = f"{COMMAND} --step-s 0.1"
    words = options("--trials", "5", "--warm-up-trials", "2", command=slow, search="quality=-5:5")
    status, output, errors = run_python(tmp_path, *words)
    assert status == 0, errors
    assert [trial.state.name for trial in study_in(tmp_path).trials] == ["COMPLETE"] * 3 + ["PRUNED"] * 2
    assert "trial 3 (--quality -4): pruned" in output
    for number in (3, 4):
        (folder,) = (tmp_path / "runs").glob(f"PongNoFrameskip-v4__pong-{number}__1__*")
        assert not (folder / "ended").exists()


@pytest.mark.slow
def test_a_search_that_is_stopped_resumes_its_runs(tmp_path):
    words = options("--trials", "2", "--workers", "2", command=f"{COMMAND} --step-s 0.2")
    process = start_python(tmp_path, *words)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/*/starts.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert [trial.state.name for trial in study_in(tmp_path).trials] == ["RUNNING"] * 2
    status, output, errors = run_python(tmp_path, *words)
    assert status == 0, output + errors
    assert [trial.state.name for trial in study_in(tmp_path).trials] == ["COMPLETE"] * 2
    for path in tmp_path.glob("runs/*/starts.jsonl"):
        first, second = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert first == 0 < second


@pytest.mark.slow
def test_a_failing_run_ends_the_search_with_its_reason(tmp_path):
    status, output, errors = run_python(tmp_path, *options("--trials", "5", search="qualty=-5:5"))
    assert status == 1
    assert "Unrecognized options: --qualty" in output
    (line,) = errors.splitlines()
    assert line.startswith("error: trial 0 (--qualty ")
    assert line.endswith("failed; its log is runs/tune/PongNoFrameskip-v4__pong-0__1.log")
    assert len(study_in(tmp_path).trials) == 1


@pytest.mark.slow
def test_runs_without_a_final_evaluation_end_the_search(tmp_path):
    status, output, errors = run_python(tmp_path, *options("--trials", "5", search="step-s=0.001:0.01"))
    assert status == 1
    assert "failed it made no final evaluation" in output
    assert "failed; its log is runs/tune/" in errors
    assert [trial.state.name for trial in study_in(tmp_path).trials] == ["FAIL"]


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_and_one_of_an_older_study_is_not_taken_over(tmp_path):
    words, path = options("--trials", "1"), tmp_path / "runs" / "tune" / "pong.db"
    assert run_python(tmp_path, *words)[0] == 0
    (before,) = study_in(tmp_path).trials
    with sqlite3.connect(path) as database:  # as if killed before the study was told of its end
        database.execute("UPDATE trials SET state = 'RUNNING'")
        database.execute("DELETE FROM trial_values")
    assert run_python(tmp_path, *words)[0] == 0
    (after,) = study_in(tmp_path).trials
    assert (after.state.name, after.value) == ("COMPLETE", before.value)
    assert len(list(tmp_path.glob("runs/PongNoFrameskip-v4__pong-0__1__*"))) == 1

    path.rename(tmp_path / "older.db")
    assert run_python(tmp_path, *options("--trials", "1", search="quality=10.0:20.0"))[0] == 0
    (new,) = study_in(tmp_path).trials
    assert new.value == pytest.approx(new.params["quality"])
    assert new.value >= 10
    assert new.intermediate_values == {10: pytest.approx(new.value)}
    assert len(list(tmp_path.glob("runs/PongNoFrameskip-v4__pong-0__1__*"))) == 2


def test_the_pictures_ticks_are_numbers(tmp_path, monkeypatch):
    study = optuna.create_study(direction="maximize")
    space = {"rate": FloatDistribution(1e-4, 2e-3, log=True), "quality": FloatDistribution(-5, 5)}
    for value in (-1.0, 2.0):
        trial = study.ask(space)
        study.tell(trial, value)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw(study, space, tmp_path / "x.png")
    figures[0].canvas.draw()
    for axes in figures[0].axes:
        labels = [label.get_text() for label in axes.get_xticklabels(which="both")]
        assert len(labels) >= 2
        assert all(float(label.replace("−", "-")) for label in labels if label != "0"), labels


@pytest.fixture
def study(tmp_path, monkeypatch) -> optuna.Study:
    """An empty one, in runs/tune of the current folder."""
    monkeypatch.chdir(tmp_path)
    trials.RECORDS.mkdir(parents=True)
    return open_study(trials.RECORDS / "study.db", "study", 1, 0)


def test_a_search_that_is_started_again_does_not_try_the_same_values_again(study):
    tried = set()
    for _ in range(4):
        study = open_study(trials.RECORDS / "study.db", "study", 1, 0)
        for _ in range(2):
            trial = study.ask({"x": FloatDistribution(0, 1)})
            tried.add(trial.params["x"])
            study.tell(trial, 1.0)
    assert len(tried) == 8


def test_a_trial_whose_values_were_not_all_chosen_is_given_up(study):
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    study.ask({"x": space["x"]})
    whole = study.ask(space)
    search = trials.Search(study, ("python", "x.py"), "PongNoFrameskip-v4", 1, space)
    (attempt,) = search.interrupted()
    assert attempt.trial.number == whole.number
    assert attempt.job.plan.command[-4:] == ("--x", str(whole.params["x"]), "--y", str(whole.params["y"]))
    study.set_user_attr("search", list(space))
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING"]
    assert len(table(study)) == 3


def test_two_processes_cannot_use_a_study_at_once(study):
    with (
        trials.locked(trials.RECORDS / "study.db"),
        pytest.raises(
            SystemExit, match=r"^error: another process uses the study runs/tune/study.db; for several"
        ),
    ):
        main(Args(command=COMMAND, env_id="PongNoFrameskip-v4", search=("quality=-5:5",)))


def test_a_study_does_not_change_what_it_varies(study, monkeypatch):
    monkeypatch.setattr(trials, "run_trials", lambda *_: 0)

    def search(*space: str) -> int:
        return main(Args(command=COMMAND, env_id="PongNoFrameskip-v4", search=space))

    # A study in which only runs failed, as with a mistyped option, is none yet.
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    assert search("td-loss=mse,hubre", "n-step=1:5") == 0
    assert search("td-loss=mse,huber", "n-step=1:5") == 0
    study.tell(study.ask(), 1.0)
    for words in (("td-loss=mse,huber", "n-step=1:5"), ("n-step=1:5", "td-loss=mse,huber")):
        assert search(*words) == 0
    for other in (
        ("td-loss=mse,huber,l1", "n-step=1:5"),
        ("td-loss=mse,huber", "n-step=1:6"),
        ("n-step=1:5",),
    ):
        with pytest.raises(
            SystemExit,
            match=r"^error: the study study was started with another search, n-step=1:5 td-loss=mse,huber;",
        ):
            search(*other)


@pytest.mark.parametrize("field", dataclasses.fields(Args), ids=lambda field: field.name)
def test_every_option_is_in_the_docs_with_its_default(field):
    page = (ROOT / "docs" / "tuning.md").read_text("utf-8")
    default = "–" if field.default is dataclasses.MISSING else field.default
    text = describe_options(Args)[field.name].help
    assert f"| `--{field.name.replace('_', '-')}` | {default} | {text} |\n" in page


def test_what_can_vary():
    assert parse_space(["temperature=0.02:1:log", "--n_step=1:5", "td-loss=mse,huber"]) == {
        "temperature": FloatDistribution(0.02, 1.0, log=True),
        "n-step": IntDistribution(1, 5),
        "td-loss": CategoricalDistribution(["mse", "huber"]),
    }


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "x=",
        "x=1",
        "x=a,a",
        "x=a,",
        "x=1:2:linear",
        "x=2:1",
        "x=0:1:log",
        "x=a:b",
        "=1:2",
        "x=1:nan",
        "x=-1e308:1e308",
        f"x=1:1{'0' * 400}",
        "x=\x1b[2J",
    ],
)
def test_what_cannot_vary_is_refused(text):
    with pytest.raises(SystemExit, match=r"^error: --search [^\n\x1b]+ write what varies as temperature="):
        parse_space([text])
    with pytest.raises(SystemExit, match=r"^error: --search names nothing"):
        parse_space([])


@pytest.mark.parametrize("damage", ["other", "cut", "page", "pipe", "later", "value", "minimize"])
def test_a_damaged_study_is_one_line(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = Path("runs/tune/study.db")
    path.parent.mkdir(parents=True)
    study = open_study(path, "study", 1, 0)
    for _ in range(50):
        study.tell(study.ask({"x": FloatDistribution(0, 1)}), 1.0)
    content = path.read_bytes()
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "value":
        with sqlite3.connect(path) as database:
            database.execute("delete from trial_values where trial_id = 3")
    elif damage == "minimize":
        with sqlite3.connect(path) as database:
            database.execute("update study_directions set direction = 'MINIMIZE'")
    elif damage == "later":  # while the search goes on
        monkeypatch.setattr(optuna.Study, "set_user_attr", lambda *_: path.write_bytes(b"x" * len(content)))
    else:
        damaged = {"other": b"x" * 9000, "cut": content[:9000], "page": content[:-4096] + bytes(4096)}
        path.write_bytes(damaged[damage])
    with pytest.raises(
        SystemExit, match=rf"^error: the study {path} cannot be used \([^\n]+\); move it away"
    ):
        main(Args(command=COMMAND, env_id="PongNoFrameskip-v4", search=("quality=-5:5",)))


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OperationalError("", (), Exception("disk is full"))],
)
def test_a_full_disk_costs_no_study(fault):
    line = r"^error: the study x.db cannot be used \([^\n]+\); free some space$"
    with pytest.raises(SystemExit, match=line), using(Path("x.db"), OSError):
        raise fault


def test_a_study_of_another_command_is_one_line_whatever_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("runs/tune/study.db")
    path.parent.mkdir(parents=True)
    study = open_study(path, "study", 1, 0)
    study.tell(study.ask({"quality": FloatDistribution(-5, 5)}), 1.0)
    study.set_user_attr("command", [1, "a b"])
    with pytest.raises(
        SystemExit, match=r"^error: the study study was started with another command, 1 'a b'"
    ):
        main(Args(command=COMMAND, env_id="PongNoFrameskip-v4", search=("quality=-5:5",)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (options(search="seed=1:3"), "--search seed: the search sets --seed; leave it out"),
        (options(command=f"{COMMAND} --exp-name x"), "the search sets --exp-name; leave it out"),
        (options(command="python none.py"), "there is no none.py"),
        (options("--study", "../x"), "--study ../x must be at most 90 letters"),
        (options("--env-id", "X"), "--env-id X is not known"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, words, says):
    status, _, errors = run_python(tmp_path, *words)
    assert status == 1
    (line,) = errors.splitlines()
    assert says in line


def test_the_seed_is_that_of_every_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials.RECORDS.mkdir(parents=True)
    study = open_study(trials.RECORDS / "study.db", "study", 5, 0)
    space = {"quality": FloatDistribution(0, 1)}
    search = trials.Search(study, ("python", "script.py"), "PongNoFrameskip-v4", 5, space)
    assert [search.next().job.plan.seed for _ in range(2)] == [5, 5]
