"""Kills a script at random instants, many times, and compares the result with that of an uninterrupted run.

    python tests/kill_storm.py --script dqn_atari --kills 60 --seed 0
    python tests/kill_storm.py --script qdagger_dqn_atari_jax_impalacnn --whole-games

The exit status is 1 if anything differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from resume_runs import KILLED, SCRIPTS, Command, differences, outcome, the_run, tiny_options


def storm(
    folder: Path, script: str, options: list[str], kills: int, seed: int, short_games: bool
) -> list[tuple[float, str]]:
    """Kills a run at random instants and resumes it, until it has been killed so often and has finished.

    A run that finishes before is followed by another, which must come out like it. Returns for each kill how
    many seconds the process had, and the last line it had printed.
    """
    rng, done = random.Random(seed), []
    attempt = 0
    options = [*options, "--checkpoint-interval", "0.3", "--resume", "auto"]
    while True:
        command = Command(folder / f"run-{attempt}", script, *options, short_games=short_games)
        start = time.monotonic()
        if len(done) < kills and command.wait_for_checkpoints(rng.randint(1, 4)):
            time.sleep(rng.uniform(0, 0.5))  # the instant
            if command.process.poll() is None and command.end(signal.SIGKILL) == KILLED:
                lines = [line for line in command.output.splitlines() if line.strip()]
                done.append((time.monotonic() - start, lines[-1] if lines else ""))
                continue
        status = command.end()
        if status != 0:
            raise RuntimeError(f"exit status {status}:\n{command.output}")
        attempt += 1
        if len(done) >= kills:
            return done


def last_words(line: str) -> str:
    """Where a run was when it was killed, without its numbers."""
    return line.split(":")[0].strip()[:40]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=SCRIPTS, default="dqn_atari")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the instants")
    parser.add_argument("--whole-games", action="store_true", help="start the script itself: much slower")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: nowhere)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="kill_storm_") as scratch:
        folder = arguments.folder or Path(scratch)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(scratch) / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        options, short_games = tiny_options(arguments.script), not arguments.whole_games
        print(f"{arguments.script}, {arguments.kills} kills, --seed {arguments.seed}", flush=True)
        calm = Command(
            folder / "calm", arguments.script, *options, "--checkpoint-interval", "0", short_games=short_games
        )
        if calm.end(timeout_s=3600):
            print(calm.output)
            return 1
        kills = storm(
            folder / "storm", arguments.script, options, arguments.kills, arguments.seed, short_games
        )
        print("kills  last printed")
        for words, count in Counter(last_words(line) for _, line in kills).most_common():
            print(f"{count:5}  {words}")
        seconds = sorted(seconds for seconds, _ in kills)
        print(f"{len(kills)} kills, {seconds[0]:.1f} to {seconds[-1]:.1f} s after the start")

        different = 0
        for run in sorted((folder / "storm").iterdir()):
            lines = differences(outcome(folder / "calm"), outcome(run))
            lives = len(list(the_run(run).glob("events.*")))
            print(f"{run.name}, in {lives} parts: {'DIFFERENT' if lines else 'the same'}")
            print(*(f"    {line}" for line in lines), sep="\n", end="\n" if lines else "")
            different += bool(lines)
    print("verdict:", f"{different} runs differ" if different else "nothing was lost")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
