"""Measures both scripts beside the baseline, the usual training loop (see baseline.py).

python tests/benchmarks/speed.py [--quick] [--device cuda] [--json FILE] [--chart FILE.png]

In each round every program (baseline, PyTorch, JAX) is started and then asked for one phase after the other,
in turn, so that whatever else the machine does affects all alike. What is measured, on Pong with the
embedded teacher:

- fill: environment steps per second while the teacher fills the replay buffer, ε falling from 1 to 0.01
- offline: gradient steps per second on what the teacher did
- online: environment steps per second while the student plays, with a gradient step every 4 steps
- evaluation: games per minute of the teacher, each cut off after a fixed number of frames; the baseline plays
  them one after another, the scripts side by side
- start-up: seconds from the start of the process until the teacher has made its first step (imports,
  environments, networks, compilation, one step of every environment)
- memory: gigabytes (10⁹ bytes) of the arrays of a full replay buffer of 1,000,000 frames, as the scripts
  compute it (replay_memory.py measures it); Stable-Baselines3's are made for 10,000 transitions and counted a
  hundredfold

The ratio says how many times better than the baseline a script is; over 1 is faster, or less memory. The
share says how much of the machine's limit is used. For gradient steps that is the floating-point operations
of an update, counted while it runs, over the rate of a large float32 matrix product; acting is not counted.
For fill and evaluation it is the games' frames over the rate of ALE's bare `act` on all cores. Numbers are
medians of the rounds, limits the best of them. A line below the table says how many operators a gradient step
has, and about how many kernels they are on a GPU. Warm-up is not counted, and compilation only in start-up.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # as for Python itself when this file is started

from programs import FRAMES_PER_STEP, TRAIN_FREQUENCY, Program

PROGRAMS = {"baseline": "baseline", "torch": "PyTorch", "jax": "JAX"}
PACKAGES = ("torch", "jax", "flax", "numpy", "gymnasium", "ale-py", "stable-baselines3")
LIMITS = ("flops_per_s", "frames_per_s")
COUNTS = ("operators", "launches")  # of a gradient step
LOAD_WORTH_A_WARNING = 0.5
Phase = Literal["fill", "offline", "online", "evaluation"]


class Amounts(NamedTuple):
    """What is done for one measurement of each phase."""

    rounds: int
    fill: int  # environment steps
    offline: int  # gradient steps
    online: int  # environment steps
    games: int
    game_frames: int


AMOUNTS = {
    "quick": Amounts(rounds=1, fill=1_600, offline=20, online=64, games=10, game_frames=2_000),
    "cpu": Amounts(rounds=3, fill=6_000, offline=60, online=320, games=10, game_frames=4_000),
    "cuda": Amounts(rounds=3, fill=20_000, offline=3_000, online=12_000, games=10, game_frames=4_000),
}


class Measure(NamedTuple):
    """A row of the table.

    `limit` and `work_per_unit` say what share of which limit a speed of 1 `unit` would take.
    """

    unit: str
    more_is_better: bool = True
    limit: Literal["flops_per_s", "frames_per_s"] | None = None
    work_per_unit: float = 0.0  # updates, whose operations are counted, or frames


def measures(game_frames: int) -> dict[str, Measure]:
    return {
        "fill": Measure("steps/s", limit="frames_per_s", work_per_unit=FRAMES_PER_STEP),
        "offline": Measure("gradient steps/s", limit="flops_per_s", work_per_unit=1),
        "online": Measure("steps/s", limit="flops_per_s", work_per_unit=1 / TRAIN_FREQUENCY),
        "evaluation": Measure("games/min", limit="frames_per_s", work_per_unit=game_frames / 60),
        "start-up": Measure("s", more_is_better=False),
        "memory": Measure("GB", more_is_better=False),
    }


class Measurement(NamedTuple):
    measure: str  # a row of the table, or a limit
    program: str
    value: float


class Cell(NamedTuple):
    """One measure of one program: median, how many times better than the baseline's, share of the limit."""

    median: float
    ratio: float
    share: float | None


def summarize(
    measurements: list[Measurement],
    limits: dict[str, float],
    update_flops: dict[str, int],
    measures: dict[str, Measure],
) -> dict[str, dict[str, Cell]]:
    """A row of cells for each measure that was made, a cell for each program."""
    table: dict[str, dict[str, Cell]] = {}
    for name, measure in measures.items():
        values = {
            program: [m.value for m in measurements if (m.measure, m.program) == (name, program)]
            for program in PROGRAMS
        }
        if not values["baseline"]:
            continue
        medians = {program: statistics.median(of_program) for program, of_program in values.items()}
        table[name] = {}
        for program, median in medians.items():
            ratio = median / medians["baseline"]
            share = None
            if measure.limit:
                work = measure.work_per_unit
                work *= update_flops[program] if measure.limit == "flops_per_s" else 1
                share = median * work / limits[measure.limit]
            table[name][program] = Cell(median, ratio if measure.more_is_better else 1 / ratio, share)
    return table


def to_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def to_markdown(table: dict[str, dict[str, Cell]], measures: dict[str, Measure]) -> str:
    """Cells as `median, ratio, share of the limit`."""
    lines = [f"| | {' | '.join(PROGRAMS.values())} |", "|---|---|---|---|"]
    for name, row in table.items():
        cells = []
        for program, cell in row.items():
            parts = [to_text(cell.median)]
            parts += [f"**{cell.ratio:.3g}×**"] if program != "baseline" else []
            parts += [f"{cell.share:.0%}"] if cell.share is not None else []
            cells.append(", ".join(parts))
        lines.append(f"| {name}, {measures[name].unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_machine(device: str) -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    models = (
        [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        if (cpu_info.exists())
        else []
    )
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "device": device,
        "load_before": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def measure_round(
    amounts: Amounts, phases: tuple[str, ...], device: str
) -> tuple[list[Measurement], dict[str, int]]:
    """One round: its measurements, and the floating-point operations of each program's update."""
    measurements: list[Measurement] = []

    def note(measure: str, program: str, value: float) -> None:
        measurements.append(Measurement(measure, program, value))
        print(f"{measure}, {program}: {value:,.2f}", file=sys.stderr, flush=True)

    with Program("limits", device) as machine:
        for limit in LIMITS:
            note(limit, machine.name, machine.ask(limit))
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(name, device)) for name in PROGRAMS]
        for program in programs:
            note("start-up", program.name, program.startup_s)
            note("memory", program.name, program.ask("replay_bytes") / 1e9)
        for phase in phases:
            for program in programs:
                if phase == "evaluation":
                    value = program.ask("evaluate", amounts.games, amounts.game_frames)
                else:
                    value = program.ask(phase, getattr(amounts, phase))
                note(phase, program.name, value)
        # The JAX script's update is the PyTorch script's.
        flops = {program.name: program.ask("update_flops") for program in programs[:2]}
        for name, number in zip(COUNTS, programs[1].ask("update_launches"), strict=True):
            note(name, "torch", number)
    return measurements, flops | {"jax": flops["torch"]}


def draw_chart(table: dict[str, dict[str, Cell]], measures: dict[str, Measure], path: Path) -> None:
    """Bars of how many times better than the baseline each script is, with the medians on them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for index, program in enumerate(("torch", "jax")):
        positions = [row + 0.4 * index - 0.2 for row in range(len(table))]
        bars = axes.bar(
            positions, [row[program].ratio for row in table.values()], 0.38, label=PROGRAMS[program]
        )
        axes.bar_label(bars, [to_text(row[program].median) for row in table.values()], fontsize=8)
    axes.axhline(1, color="black", linewidth=1, label="baseline")
    labels = [f"{name}\n({measures[name].unit})" for name in table]
    axes.set_xticks(range(len(table)), labels)
    axes.set_ylabel("times better than the baseline")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    json: Path | None = None,
    phases: tuple[Phase, ...] = ("fill", "offline", "online", "evaluation"),
    device: Literal["cpu", "cuda"] = "cpu",
    quick: bool = False,
    chart: Path | None = None,
) -> None:
    """Measures both scripts beside the baseline and prints a Markdown table.

    Args:
        json: where to write every single measurement, the summary, and what machine it was.
        phases: which of fill, offline, online, evaluation. Start-up and memory come with each.
        device: where to train.
        quick: one short round, in two and a half minutes on two idle cores.
        chart: where to draw the ratios to the baseline, as PNG.
    """
    if chart and not importlib.util.find_spec("matplotlib"):
        raise SystemExit("error: --chart needs matplotlib: pip install matplotlib")
    machine = describe_machine(device)
    if machine["load_before"] > LOAD_WORTH_A_WARNING:
        print(
            f"warning: the machine is busy (load {machine['load_before']:.1f}); that slows the baseline "
            "most, as its threads spin while they wait",
            file=sys.stderr,
        )
    amounts = AMOUNTS["quick" if quick else device]
    rows = measures(amounts.game_frames)
    rounds = [measure_round(amounts, phases, device) for _ in range(amounts.rounds)]
    measurements = [measurement for of_round, _ in rounds for measurement in of_round]
    update_flops = rounds[0][1]
    limits = {limit: max(m.value for m in measurements if m.measure == limit) for limit in LIMITS}
    table = summarize(measurements, limits, update_flops, rows)
    print(to_markdown(table, rows))
    operators, launches = ({m.measure: m.value for m in measurements}[name] for name in COUNTS)
    print(
        f"\nPyTorch's gradient step has {operators:.0f} operators: on a GPU about {launches:.0f} launches, "
        "or 1 as a CUDA graph."
    )
    if json:
        write_json(json, machine, amounts, measurements, limits, update_flops, table)
    if chart:
        draw_chart(table, rows, chart)


def write_json(
    path: Path,
    machine: dict[str, Any],
    amounts: Amounts,
    measurements: list[Measurement],
    limits: dict[str, float],
    update_flops: dict[str, int],
    table: dict[str, dict[str, Cell]],
) -> None:
    content = {
        "machine": machine,
        "amounts": amounts._asdict(),
        "limits": limits,
        "update_flops": update_flops,
        "summary": {
            name: {program: cell._asdict() for program, cell in row.items()} for name, row in table.items()
        },
        "measurements": [measurement._asdict() for measurement in measurements],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
