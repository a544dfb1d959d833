"""A training script that learns nothing: it counts, as slowly as it is told, and writes a run as others do.

Its result depends on every step: what went wrong between a checkpoint and what went on from it shows.
"""

import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cleanrl.utils.command_line import parse_arguments
from cleanrl.utils.run.checkpoint import Run
from cleanrl.utils.run.events import EventWriter
from cleanrl.utils.storage import write_durably


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    env_id: str = "PongNoFrameskip-v4"
    seed: int = 1
    total_timesteps: int = 20
    step_s: float = 0.02
    state_bytes: int = 1000
    checkpoint_interval: float = 0.1
    resume: str | None = None
    fail_seed: int | None = None
    """with this seed it fails halfway, unless it has been gone on with"""
    die_seed: int | None = None
    """the same, killed by a signal"""
    slow_seed: int | None = None
    """with this seed each step takes a hundred times as long"""
    deaf: bool = False
    """does not hear SIGTERM"""


def result(seed: int, steps: int) -> str:
    """What a run must come to."""
    value = ""
    for step in range(1, steps + 1):
        value = next_value(value, seed, step)
    return value


def next_value(value: str, seed: int, step: int) -> str:
    return hashlib.sha256(f"{value} {seed} {step}".encode()).hexdigest()


def main(args: Args) -> None:
    with Run(args, "fake_training") as run:
        if args.deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        step, value = 0, ""
        if run.resumed:
            step, value = (run.resumed.read_state()[name] for name in ("step", "value"))
        start = {
            "step": step,
            "where": os.getcwd(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "process": os.getpid(),
            "time": time.time(),
        }
        with (run.folder / "starts.jsonl").open("a") as file:
            print(json.dumps(start), file=file)
        writer = EventWriter(run.folder)
        with tqdm(total=args.total_timesteps, initial=step, desc="counting", unit=" steps") as progress:
            while step < args.total_timesteps:
                if run.is_due():
                    writer.flush()
                    state = {"step": step, "value": value, "noise": os.urandom(args.state_bytes)}
                    run.save(state, "none", None)
                run.raise_if_stopped()
                time.sleep(args.step_s * (100 if args.seed == args.slow_seed else 1))
                step += 1
                value = next_value(value, args.seed, step)
                writer.add_scalar("charts/step", step, step)
                progress.update()
                if step == args.total_timesteps // 2 and not run.resumed:
                    if args.seed == args.fail_seed:
                        raise SystemExit(f"error: seed {args.seed} cannot go on")
                    if args.seed == args.die_seed:
                        os.kill(os.getpid(), signal.SIGKILL)
        write_durably(run.folder / f"{args.exp_name}.cleanrl_model", value.encode())
        (run.folder / "ended").write_text(str(time.time()))
        writer.close()
        run.finish()


if __name__ == "__main__":
    main(parse_arguments(Args))
