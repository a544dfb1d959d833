"""Measures the scripts' speed by the number of environments and by the size of the replay buffer.

python tests/benchmarks/scaling.py [--device cuda] [--json FILE]

Two tables: environment steps per second of the online phase (a gradient step every 4 steps) over
`--num-envs`; and, for a replay buffer that holds 10,000, 100,000 and 1,000,000 frames of 8 environments, the
microseconds to add one step of all of them, and to draw and gather one batch of 32. The largest takes 7.1 GB.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # as for Python itself when this file is started

from programs import Program

SCRIPTS = {"torch": "PyTorch", "jax": "JAX"}
NUM_ENVS = (1, 2, 4, 8, 16)
STORED = (10_000, 100_000, 1_000_000)
ONLINE_STEPS = {"cpu": 160, "cuda": 8_000}


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Prints both tables, row by row.

    Args:
        device: where to train.
        json_path: where to write the numbers as well.
    """
    speeds: dict[int, dict[str, float]] = {}
    print_row("--num-envs", *(f"{label}, steps/s" for label in SCRIPTS.values()))
    print("|---|---|---|")
    for num_envs in NUM_ENVS:
        speeds[num_envs] = {}
        for script in SCRIPTS:
            with Program(script, device, num_envs) as program:
                speeds[num_envs][script] = program.ask("online", ONLINE_STEPS[device])
        print_row(num_envs, *(f"{speed:,.1f}" for speed in speeds[num_envs].values()))

    times: dict[int, dict[str, dict[str, float]]] = {}
    print()
    print_row("frames stored", *(f"{label}: add / batch, µs" for label in SCRIPTS.values()))
    print("|---|---|---|")
    for stored in STORED:
        times[stored] = {}
        for script in SCRIPTS:
            with Program(script, device) as program:
                times[stored][script] = program.ask("time_replay", stored)
        cells = [f"{time['add_us']:,.0f} / {time['sample_us']:,.0f}" for time in times[stored].values()]
        print_row(f"{stored:,}", *cells)
    if json_path:
        json_path.write_text(json.dumps({"online": speeds, "replay": times}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
