"""Many runs on this machine: which are done, missing or resumed, and what the benchmark says of them."""

import dataclasses
import errno
import importlib
import io
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import fake_training
import filelock
import psutil
import pytest
import tyro
from many_runs import GAME, ROOT, Benchmark, curve, model, saved_step, starts, the_folder
from tqdm import tqdm

from cleanrl.utils.benchmark import logs, processes, records
from cleanrl.utils.benchmark.__main__ import Args, check, main
from cleanrl.utils.benchmark.logs import last_line, last_words, short_progress
from cleanrl.utils.benchmark.plan import Plan, plan_runs
from cleanrl.utils.benchmark.records import Job
from cleanrl.utils.benchmark.view import View
from cleanrl.utils.games.parallel_envs import available_cores

GAMES = (GAME, "BreakoutNoFrameskip-v4")
QUICK = "python fake_training.py"
RECORD = Path(f"runs/benchmark/{GAME}__fake_training__1.json")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(processes, "POLL_S", 0.05)
    shutil.copy(ROOT / "tests" / "fake_training.py", tmp_path)
    yield
    Benchmark.end_all()


def run(command: str = QUICK, games: tuple[str, ...] = (GAME,), seeds: int = 1, **options: object) -> int:
    return main(Args(env_ids=games, command=(command,), num_seeds=seeds, **options))


def files() -> dict[str, bytes]:
    """What the runs have written, without the benchmark's own files."""
    return {str(p): p.read_bytes() for p in Path("runs").glob("*__*/**/*") if p.is_file()}


@pytest.mark.slow
def test_every_game_and_seed_is_run_by_as_many_workers(capsys):
    assert run(QUICK + " --step-s 0.05", GAMES, seeds=2, start_seed=3, workers=2) == 0
    for game in GAMES:
        for seed in (3, 4):
            assert model(Path(), seed, game) == fake_training.result(seed, 20)
    assert len(list(Path("runs").glob("*__*"))) == 4
    spans = []
    for folder in Path("runs").glob("*__*"):
        game, _, seed, _ = folder.name.split("__")
        (start,) = starts(Path(), int(seed), game)
        spans += [(start["time"], 1), (float((folder / "ended").read_text()), -1)]
    at_once, most = 0, 0
    for _, change in sorted(spans):
        at_once += change
        most = max(most, at_once)
    assert most == 2
    output = capsys.readouterr().out
    for game in GAMES:
        for seed in (3, 4):
            assert re.search(
                rf"^{game} +fake_training  {seed}  done  0:0\d:\d\d  runs/{game}__", output, re.M
            )
    assert "4 runs: 4 done" in output


@pytest.mark.slow
def test_a_run_that_fails_ends_no_other_and_is_resumed_at_the_next_start(capsys):
    command = QUICK + " --fail-seed 1 --die-seed 2"
    assert run(command, seeds=3) == 1
    output = capsys.readouterr().out
    assert re.search(
        r"  1  failed  .*  error: seed 1 cannot continue \(see runs/benchmark/.*1\.log\)", output
    )
    assert re.search(r"  2  failed  .*  killed by SIGKILL: out of memory\?", output)
    assert re.search(r"  3  done  ", output)
    assert "3 runs: 1 done, 2 failed" in output
    done = the_folder(Path(), 3)
    before = {path: content for path, content in files().items() if path.startswith(str(done))}

    assert run(command, seeds=3) == 0
    assert "3 runs, 1 of them already done" in capsys.readouterr().out
    for seed in (1, 2):
        first, again = starts(Path(), seed)
        assert 0 == first["step"] < again["step"] <= 10
        assert model(Path(), seed) == fake_training.result(seed, 20)
        assert curve(the_folder(Path(), seed)) == list(range(1, 21))
    assert before.items() <= files().items()


@pytest.mark.slow
def test_done_means_done_with_this_very_command(capsys):
    assert run() == 0
    before = files()
    for command in (QUICK + " --total-timesteps 30", "python fake_training.py --step-s 0.03"):
        with pytest.raises(SystemExit) as end:
            run(command)
        now = command.removeprefix("python ")
        assert f"1 was started as `fake_training.py`, not as `{now}`; give this one its own" in end.value.code
    assert files() == before
    assert run(QUICK + " --total-timesteps 30 --exp-name longer") == 0
    (longer,) = Path("runs").glob(f"{GAME}__longer__1__*")
    assert (longer / "longer.cleanrl_model").read_text() == fake_training.result(1, 30)
    capsys.readouterr()
    assert run(f"{shlex.quote(sys.executable)} fake_training.py") == 0  # another name of the same Python
    assert "1 of them already done" in capsys.readouterr().out


def test_a_mistyped_option_can_be_corrected():
    """No run came of it."""
    assert run(QUICK + " --totl-timesteps 30") == 1
    assert RECORD.exists()
    assert run(QUICK + " --total-timesteps 30") == 0
    (folder,) = Path("runs").glob("*__*")
    assert (folder / "fake_training.cleanrl_model").read_text() == fake_training.result(1, 30)


def test_a_failed_run_is_not_resumed_with_other_options():
    assert run(QUICK + " --fail-seed 1") == 1
    with pytest.raises(SystemExit, match="to start over"):
        run(QUICK)
    RECORD.unlink()
    assert run(QUICK) == 0
    assert len(list(Path("runs").glob("*__*"))) == 2
    assert [start["step"] for start in starts(Path(), 1)] == [0]


def test_a_run_that_it_did_not_start_is_left_alone():
    """`--resume auto` would resume it, with its options."""
    command = [sys.executable, "fake_training.py", "--fail-seed", "1", "--step-s", "0.04"]
    assert subprocess.run(command, capture_output=True).returncode == 1
    foreign = the_folder(Path(), 1)
    before = files()
    assert run() == 0
    assert the_folder(Path(), 1) != foreign
    assert before.items() <= files().items()


def test_a_deleted_result_is_made_again():
    assert run() == 0
    shutil.rmtree(the_folder(Path(), 1))
    assert run() == 0
    assert model(Path(), 1) == fake_training.result(1, 20)


def test_several_experiments_at_once():
    command = (QUICK, QUICK + " --exp-name=other --total-timesteps 5")
    assert main(Args(env_ids=(GAME,), command=command, num_seeds=1)) == 0
    (other,) = Path("runs").glob(f"{GAME}__other__1__*")
    assert (other / "other.cleanrl_model").read_text() == fake_training.result(1, 5)
    assert model(Path(), 1) == fake_training.result(1, 20)


@pytest.mark.slow
def test_when_it_is_stopped_the_runs_save_a_checkpoint_and_resume_later(tmp_path):
    options = "--total-timesteps 100 --step-s 0.05 --checkpoint-interval 0"  # only when stopped
    stopped_at = [0]
    for number in (signal.SIGINT, signal.SIGTERM):
        driver = Benchmark(tmp_path, options, "--num-seeds", "2")
        driver.wait_until(lambda: len(starts(tmp_path, 1)) == len(stopped_at))
        time.sleep(0.3)
        assert driver.end(number) == 128 + number
        assert "2 runs: 1 stopped, 1 waiting" in driver.output
        assert not psutil.pid_exists(starts(tmp_path, 1)[-1]["process"])
        stopped_at.append(saved_step(tmp_path, 1))
        assert stopped_at[-2] < stopped_at[-1] < 100

    assert run(f"{QUICK} {options}", seeds=2, workers=2) == 0
    assert [start["step"] for start in starts(tmp_path, 1)] == stopped_at
    for seed in (1, 2):
        assert model(Path(), seed) == fake_training.result(seed, 100)


def test_a_run_that_does_not_stop_is_killed(tmp_path):
    driver = Benchmark(tmp_path, "--step-s 0.5 --deaf", "--num-seeds", "1", "--grace-period", "1")
    driver.wait_until(lambda: starts(tmp_path, 1))
    time.sleep(0.5)
    assert driver.end(signal.SIGTERM, timeout_s=60) == 143
    assert "1 runs: 1 stopped" in driver.output
    assert not psutil.pid_exists(starts(tmp_path, 1)[0]["process"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_when_the_benchmark_itself_is_killed_the_runs_save_a_checkpoint(tmp_path):
    options = "--total-timesteps 100 --step-s 0.05 --checkpoint-interval 0"
    driver = Benchmark(tmp_path, options, "--num-seeds", "1")
    driver.wait_until(lambda: RECORD.exists() and "__" in RECORD.read_text())
    driver.end(signal.SIGKILL)
    process = starts(tmp_path, 1)[0]["process"]
    deadline = time.monotonic() + 60
    while psutil.pid_exists(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(f"{QUICK} {options}") == 0
    assert [start["step"] > 0 for start in starts(tmp_path, 1)] == [False, True]


def test_a_run_that_finished_while_the_benchmark_was_dead_is_done():
    assert run() == 0
    RECORD.write_text(RECORD.read_text().replace('"done"', '"running"'))
    before = files()
    assert run() == 0
    assert files() == before


def test_a_run_that_failed_after_it_had_finished_is_done(capsys):
    """As where the Hub refuses its model."""
    Path("fake_training.py").write_text(
        Path("fake_training.py").read_text() + "    raise SystemExit('error: no upload')\n"
    )
    for _ in range(2):
        assert run() == 0
        assert re.search(r"  1  done  .*  error: no upload \(runs/", capsys.readouterr().out)
    assert len(starts(Path(), 1)) == 1


def test_a_run_that_the_user_has_resumed_and_finished_is_done():
    assert run(QUICK + " --fail-seed 1") == 1
    folder = the_folder(Path(), 1)
    subprocess.run([sys.executable, "fake_training.py", "--resume", folder], check=True, capture_output=True)
    before = files()
    assert run(QUICK + " --fail-seed 1") == 0
    assert files() == before


@pytest.mark.parametrize(
    ("workers", "own", "expected"),
    [(None, None, None), (2, None, str(max(1, available_cores() // 2))), (2, "7", "7")],
)
def test_workers_share_the_cores_unless_the_user_says_otherwise(monkeypatch, workers, own, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    assert run(QUICK + " --total-timesteps 1", workers=workers) == 0
    assert starts(Path(), 1)[0]["threads"] == expected


def test_xla_has_as_many_threads_as_it_is_given():
    program = """
import os
import jax.numpy as jnp
(jnp.ones((500, 500)) @ jnp.ones((500, 500))).block_until_ready()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum(name.startswith("tf_XLAEigen") for name in names))
"""
    variables = processes.run_environment(3)
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.stdout == "3\n", done.stderr


def test_two_benchmarks_do_not_share_a_run():
    RECORD.parent.mkdir(parents=True)
    refusal = "another benchmark is running Pong.*; wait until it has finished"
    with filelock.FileLock(RECORD.with_suffix(".lock")), pytest.raises(SystemExit, match=refusal):
        run()
    assert not files()


@pytest.mark.parametrize(
    "record",
    [
        '{"command": ["fake_training.py"], "st',
        "[]",
        '{"command": "x"}',
        '{"command": [1]}',
        '{"command": ["x"], "state": "lost"}',
        '{"command": ["x"], "seconds": "1"}',
        '{"command": ["x"], "folder": "../../elsewhere"}',
        f'{{"command": ["x"], "folder": "{GAME}__fake_training__1__{"7" * 300}"}}',  # longer than any name
        '{"command": ["x"], "seconds": Infinity}',
        '{"command": ["x"], "seconds": NaN}',
        '{"command": ["x"], "seconds": 1e400}',
        f'{{"command": ["x"], "seconds": 1{"0" * 400}}}',
        f'{{"command": ["x"], "starts": 1{"0" * 400}}}',
        "[" * 200_000,
        " " * 2**24 + '{"command": ["fake_training.py"]}',
    ],
    ids=range(15),
)
def test_a_damaged_record_is_a_one_line_error(record):
    RECORD.parent.mkdir(parents=True)
    RECORD.write_text(record)
    with pytest.raises(SystemExit, match=r"json is damaged; delete it to start that run again"):
        run()


def test_a_full_disk_costs_only_the_record(monkeypatch, capsys):
    job = Job(Plan(GAME, "fake", 1, ("fake.py",)), Path("runs/benchmark"))
    job.end("done", "kept")
    monkeypatch.setattr(records, "write_durably", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    job.end("failed", "lost")
    assert capsys.readouterr().err == f"warning: {job.record_path} cannot be written (No space left)\n"
    assert (job.record.state, json.loads(job.record_path.read_text())["state"]) == ("failed", "done")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("path", [RECORD, RECORD.with_suffix(".log")])
def test_what_is_no_file_is_a_one_line_error(make, path):
    RECORD.parent.mkdir(parents=True)
    make(path)
    with pytest.raises(SystemExit, match=rf"^error: {path} is not a file; remove it$"):
        run()


def test_without_a_folder_for_the_records_it_says_so():
    Path("runs").touch()
    with pytest.raises(
        SystemExit, match=r"^error: runs/benchmark cannot be written to \(Not a directory\); "
    ):
        run()


def test_more_locks_than_files_may_be_open_are_a_one_line_error():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        with pytest.raises(SystemExit, match=r"^error: 101 runs need more open files .*: ulimit -n 201$"):
            run(seeds=101)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"games": ("Pong",)}, "error: --env-id Pong is not known; did you mean PongNoFrameskip-v4?"),
        ({"games": ()}, "error: --env-ids names no game; name at least one, such as PongNoFrameskip-v4"),
        ({"games": (GAME, GAME)}, f"error: --env-ids {GAME} is named 2 times; once is enough"),
        ({"seeds": 0}, "error: --num-seeds 0 must be at least 1"),
        (
            {"games": GAMES, "seeds": 2 * 10**9},
            "error: --num-seeds 2000000000 makes 4000000000 runs; a benchmark has at most 10000",
        ),
        ({"start_seed": -1}, "error: --start-seed -1 must be between 0 and 4294967295"),
        (
            {"start_seed": 2**32 - 1, "seeds": 2},
            "error: --start-seed 4294967295 leads beyond the largest seed, 4294967295",
        ),
        ({"workers": 0}, "error: --workers 0 must be at least 1"),
        (
            {"workers": 2, "ray_address": "local"},
            "error: --workers 2 applies to this machine only; on Ray, use --cpus-per-run",
        ),
        (
            {"gpus_per_run": 0.5},
            "error: --gpus-per-run 0.5 needs --ray-address; without Ray all runs share all GPUs",
        ),
        (
            {"gpus_per_run": 1.5, "ray_address": "local"},
            "error: --gpus-per-run 1.5 must be a fraction of one GPU, or a whole number",
        ),
        ({"report_interval": 0.0}, "error: --report-interval 0.0 must be above 0"),
        ({"grace_period": float("nan")}, "error: --grace-period nan must be at least 0"),
    ],
)
def test_bad_options_are_a_one_line_error_and_nothing_starts(options, line):
    with pytest.raises(SystemExit) as end:
        run(**options)
    assert end.value.code == line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("commands", "fault"),
    [
        ([QUICK + " --seed 3"], f"{QUICK} --seed 3: the benchmark sets --seed; leave it out"),
        ([QUICK + " --env_id=Pong"], f"{QUICK} --env_id=Pong: the benchmark sets --env-id; leave it out"),
        (["no-such-python x.py"], "no-such-python x.py: there is no program no-such-python"),
        (["python cleanrl/dqn.py"], "python cleanrl/dqn.py: there is no cleanrl/dqn.py in /"),
        (["python 'fake"], "python 'fake: No closing quotation"),
        (["python -c pass"], "python -c pass: name the experiment with --exp-name NAME"),
        ([QUICK + " --exp-name a/b"], f"{QUICK} --exp-name a/b: --exp-name must be at most 100 letters, "),
        ([QUICK + " --exp-name=[v2]"], f"{QUICK} --exp-name=[v2]: --exp-name must be at most 100 letters, "),
        (["python " + "x" * 5000 + ".py"], f"python {'x' * 93}… (5010 characters): there is no xxx"),
        ([""], 'is empty; use, say, --command "python cleanrl/dqn_atari.py"'),
        ([], 'names no script; use, say, --command "python cleanrl/dqn_atari.py"'),
        ([QUICK, QUICK + " --deaf"], "has the experiment fake_training 2 times; give each an --exp-name"),
    ],
)
def test_bad_commands_are_a_one_line_error_and_nothing_starts(commands, fault):
    with pytest.raises(SystemExit) as end:
        main(Args(env_ids=(GAME,), command=tuple(commands)))
    assert end.value.code.startswith(f"error: --command {fault}")
    assert "\n" not in end.value.code
    assert not Path("runs").exists()


def test_without_ray_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cleanrl.utils.benchmark.ray_cluster")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"needs Ray: pip install -r requirements/requirements-cloud\.txt"):
        run(ray_address="local")


def test_other_programs_have_failed(capsys):
    Path("other.py").write_text("print('hello')")
    assert run("python other.py") == 1
    fault = "left no finished folder in runs/ (exit status 0): is it a training script?"
    assert fault in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- what it says


PAGE = (ROOT / "docs" / "many-runs.md").read_text("utf-8")


@pytest.mark.parametrize("command", re.findall(r"^python -m cleanrl\.utils\.benchmark (.*)$", PAGE, re.M))
def test_commands_in_the_docs_are_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = tyro.cli(Args, args=shlex.split(command))
    check(args)
    for plan in plan_runs(args.command, args.env_ids, [1]):
        script = importlib.import_module(f"cleanrl.{Path(plan.command[1]).stem}")
        tyro.cli(script.Args, args=plan.words(None)[2:])


def test_names_of_lists_stand_for_their_games():
    args = Args(env_ids=("atari5", "PongNoFrameskip-v4"), command=("python cleanrl/dqn_atari.py",))
    check(args)
    games = ("BattleZone", "DoubleDunk", "NameThisGame", "Phoenix", "Qbert", "Pong")
    assert args.env_ids == tuple(f"{game}NoFrameskip-v4" for game in games)
    args = Args(env_ids=("atari57",), command=("python cleanrl/dqn_atari.py",))
    check(args)  # each of them is known
    assert len(set(args.env_ids)) == 56  # without Surround
    with pytest.raises(SystemExit, match="NoFrameskip-v4 is named 2 times"):
        check(Args(env_ids=("atari5", "atari57"), command=("python cleanrl/dqn_atari.py",)))


@pytest.mark.parametrize("field", dataclasses.fields(Args), ids=lambda field: field.name)
def test_every_option_is_in_the_docs_with_its_default(field):
    (row,) = re.findall(rf"^\| `--{field.name.replace('_', '-')}` .*$", PAGE, re.M)
    has_default = field.default is not dataclasses.MISSING and field.default is not None
    assert row.split(" | ")[1] == (str(field.default) if has_default else "–")


def test_progress_is_tqdms_line_without_its_bar(tmp_path):
    stream = io.StringIO()
    progress = tqdm(total=200, desc="offline", unit=" updates", file=stream, mininterval=0)
    progress.update(0)
    time.sleep(0.02)
    progress.set_postfix({"mean return": "1.5"}, refresh=False)
    progress.update(90)
    line = stream.getvalue().rpartition("\r")[2].strip()
    speed = re.search(r"[\d.]+ updates/s", line).group()
    left = re.search(r"<([\d:]+),", line).group(1)
    assert short_progress(line) == f"offline 45%, {speed}, {left} left, mean return=1.5"
    log = tmp_path / "log"
    log.write_text("(2) the student learns" + stream.getvalue())
    assert last_line(log) == line
    assert short_progress("(2) the student learns") == "(2) the student learns"
    endless = "a: 1% [1<" * 2000  # which would take the search for progress minutes
    assert short_progress(endless) == endless


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("a\nerror: no\n", "error: no"),
        ("Traceback…\n  File\nValueError: 3\n\n", "ValueError: 3"),
        ("error: no\nfake: 45%|████▌     | 9/20 [00:01<00:01,  9 steps/s]", "error: no"),
        ("╭─ Value error ───╮\n│ Error parsing --seed: x   │\n│ ─── │\n│ see --help │\n╰───────╯\n",
         "Error parsing --seed: x"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_last_words_of_a_run_are_its_error(tmp_path, printed, words):
    log = tmp_path / "log"
    log.write_text("--- started before: x\nerror: of the start before\n--- started now: x\n" + printed)
    assert last_words(log) == words


def test_a_log_is_cut_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MOST_BYTES", 1000)
    monkeypatch.setattr(logs, "KEPT_BYTES", 100)
    log, sizes, cut = tmp_path / "log", [], 0
    assert logs.shorten(log) == 0
    with log.open("ab", buffering=0) as output:  # as a run's process has it
        for number in range(100):
            output.write(f"line {number:4}: {'x' * 38}\n".encode())
            sizes.append(log.stat().st_size)
            cut += logs.shorten(log)
    assert max(sizes) == 1050
    assert cut + log.stat().st_size == 5000
    assert last_line(log) == f"line   99: {'x' * 38}"
    assert log.read_text().splitlines()[-2:] == [f"line {number:4}: {'x' * 38}" for number in (98, 99)]


def test_a_wrong_option_is_named_in_the_table(capsys):
    assert run(QUICK + " --learning-rte 3") == 1
    assert "  Unrecognized options: --learning-rte, 3 (see " in capsys.readouterr().out


def test_what_a_run_prints_cannot_move_the_cursor(capsys):
    Path("other.py").write_text(r"import sys; sys.exit('error: \x1b[2J')")
    assert run("python other.py") == 1
    assert r"  error: \x1b[2J (see " in capsys.readouterr().out
    record = Path(f"runs/benchmark/{GAME}__other__1.json")
    changes = {"command": ["\x1b[2J"], "folder": f"{GAME}__other__1__7"}
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    with pytest.raises(SystemExit) as end:
        run("python other.py")
    assert r" was started as `\x1b[2J`, not as `other.py`; " in end.value.code


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def text(self) -> str:
        """What was written; times are zero, as on a fast machine."""
        return re.sub(r"0:00:0\d", "0:00:00", self.getvalue())


@pytest.fixture
def jobs():
    """Eight seeds, of which the third is running."""
    jobs = [Job(Plan(GAME, "fake", seed, ("fake.py",)), Path("runs/benchmark")) for seed in range(8)]
    jobs[2].begin()
    jobs[2].progress = "offline 45%, 3.20 updates/s, 00:12 left"
    return jobs


def test_without_a_terminal_it_reports_changes_and_now_and_then_the_rest(jobs):
    stream = Stream(is_terminal=False)
    view = View(stream, jobs, interval_s=0.2)
    view.update()
    assert stream.text == ""
    jobs[2].end("done", "")
    jobs[3].begin("node-1")
    view.update()
    lines = stream.text.splitlines()
    assert lines == [
        f"{GAME}  fake  2  done     0:00:00",
        f"{GAME}  fake  3  running  0:00:00  node-1: starting",
    ]
    time.sleep(0.2)
    view.update()
    assert stream.text.splitlines()[2:] == [
        f"{GAME}  fake  3  running  0:00:00  node-1: starting",
        "8 runs: 1 done, 1 running, 6 waiting",
    ]
    assert "\x1b" not in stream.text


def test_on_a_terminal_it_draws_in_one_place_and_within_its_size(jobs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "6")
    stream = Stream(is_terminal=True)
    view = View(stream, jobs, interval_s=60)
    view.update()
    lines = stream.text.splitlines()
    assert lines == [
        f"{GAME}  fake  0  waiting  0:00:00",
        f"{GAME}  fake  1  waiting  0:00:00",
        f"{GAME}  fake  2  running  0:00:00  offline 45%, 3.20 updates/s"[:59],
        "… and 5 more",
        "8 runs: 1 running, 7 waiting",
    ]
    jobs[2].end("failed", "error: no")
    view.update()
    drawn = stream.text.rpartition("\x1b[5F\x1b[J")[2].splitlines()
    assert drawn[2] == f"{GAME}  fake  2  failed   0:00:00  error: no"
    view.clear()
    assert stream.text.endswith("\x1b[5F\x1b[J")


def test_ctrl_c_on_a_real_terminal(tmp_path):
    """It reaches only the benchmark; the runs end with a checkpoint."""
    command = [
        sys.executable, "-m", "cleanrl.utils.benchmark", "--env-ids", GAME, "--num-seeds", "1",
        "--command", f"{QUICK} --step-s 0.05 --total-timesteps 100 --checkpoint-interval 0",
    ]  # fmt: skip
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, command)
    seen = b""
    while b"counting" not in seen:
        seen += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    try:
        while data := os.read(terminal, 1000):
            seen += data
    except OSError:  # the other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert b"\x1b[J" in seen
    assert b"1 runs: 1 stopped" in seen
    assert saved_step(tmp_path, 1) > 0


def test_every_run_of_a_seed_comes_before_those_of_the_next():
    plans = plan_runs(["python -m a", "python -m b"], ["X", "Y"], [1, 2])
    expected = [(seed, env_id, exp_name) for seed in (1, 2) for env_id in "XY" for exp_name in "ab"]
    assert [(plan.seed, plan.env_id, plan.exp_name) for plan in plans] == expected
