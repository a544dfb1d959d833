"""A training script that learns nothing: it counts, as slowly as it is told, and writes a run as others do.

Its result depends on every step, so that any fault between a checkpoint and its resumption shows.
"""

import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from cleanrl.utils.command_line import parse_arguments
from cleanrl.utils.run.charts import EPISODIC_RETURN, OFFLINE_RETURN
from cleanrl.utils.run.options import RunOptions
from cleanrl.utils.run.training_run import TrainingRun
from cleanrl.utils.shell import prepare_command
from cleanrl.utils.storage import write_durably


@dataclass
class Args(RunOptions):
    exp_name: str = Path(__file__).stem
    """part of the name of the run's folder"""
    checkpoint_interval: float = 0.1
    """seconds between two checkpoints"""
    env_id: str = "PongNoFrameskip-v4"
    """a game, which is not played"""
    repeat_action_probability: float = 0.0
    """of this game"""
    total_timesteps: int = 20
    """steps to count"""
    step_s: float = 0.02
    """seconds for a step"""
    state_bytes: int = 1000
    """size of a checkpoint"""
    fail_seed: int | None = None
    """with this seed it fails halfway, unless it was resumed"""
    die_seed: int | None = None
    """with this seed it is killed by a signal halfway, unless it was resumed"""
    slow_seed: int | None = None
    """with this seed each step takes a hundred times as long"""
    deaf: bool = False
    """ignore SIGTERM"""
    quality: float | None = None
    """the return of every evaluation: halfway, which is called offline, and at the end"""
    eval_episodes: int = 2
    """games in the final evaluation"""


@dataclass
class State:
    step: int = 0
    value: str = ""
    noise: bytes = b""
    gradient_steps: int = 0


def result(seed: int, steps: int) -> str:
    """What a run must come to."""
    value = ""
    for step in range(1, steps + 1):
        value = next_value(value, seed, step)
    return value


def next_value(value: str, seed: int, step: int) -> str:
    return hashlib.sha256(f"{value} {seed} {step}".encode()).hexdigest()


def main(args: Args) -> None:
    state = State()
    with TrainingRun(args, Path(__file__), state, make_env=print, model="none") as run:
        if args.deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        start = {
            "step": state.step,
            "where": os.getcwd(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "process": os.getpid(),
            "time": time.time(),
        }
        with (run.folder / "starts.jsonl").open("a") as file:
            print(json.dumps(start), file=file)
        with run.progress("counting", state.step, args.total_timesteps, "steps") as progress:
            while state.step < args.total_timesteps:
                state.noise = os.urandom(args.state_bytes)
                run.checkpoint()
                time.sleep(args.step_s * (100 if args.seed == args.slow_seed else 1))
                state.step += 1
                state.value = next_value(state.value, args.seed, state.step)
                run.plot({EPISODIC_RETURN: state.step}, state.step)
                progress.update()
                if state.step == args.total_timesteps // 2 and args.quality is not None:
                    run.plot({OFFLINE_RETURN: args.quality}, state.step)
                    run.plot({}, state.step)  # which writes what was plotted before
                    run.writer.flush()
                if state.step == args.total_timesteps // 2 and not args.resume:
                    if args.seed == args.fail_seed:
                        raise SystemExit(f"error: seed {args.seed} cannot continue")
                    if args.seed == args.die_seed:
                        os.kill(os.getpid(), signal.SIGKILL)
        if args.quality is not None:
            run.finish([args.quality - 1, args.quality + 1])
        write_durably(run.folder / f"{args.exp_name}.cleanrl_model", state.value.encode())
        (run.folder / "ended").write_text(str(time.time()))


if __name__ == "__main__":
    prepare_command()
    main(parse_arguments(Args))
