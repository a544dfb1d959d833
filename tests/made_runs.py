"""Runs with made-up results, for reports; their event files are those of torch's SummaryWriter."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cleanrl.utils.report.runs import find_runs
from cleanrl.utils.report.statistics import Group, group_runs
from cleanrl.utils.run.charts import (
    EPISODIC_RETURN,
    EPSILON,
    EVALUATION_RETURN,
    OFFLINE_RETURN,
    TEACHER_RETURN,
)

QDAGGER = {"offline_steps": 100, "teacher_steps": 20, "teacher_replay_path": None}


def write_run(
    folder, experiment="dqn", seed=1, start_time=1000, game="Breakout", games=(), evaluation=(5.0, 7.0),
    teacher=None, offline=(), last_step=None, **options,
) -> Path:  # fmt: skip
    """A finished run in `folder`; `games` and `offline` are pairs of plotted step and return."""
    run = folder / f"{game}NoFrameskip-v4__{experiment}__{seed}__{start_time}"
    options = {"seed": seed, "num_envs": 8, "total_timesteps": 1000, "eval_episodes": 2} | options
    rows = ["|option|value|", "|-|-|", *(f"|{name}|{value}|" for name, value in options.items())]
    points = [] if teacher is None else [(TEACHER_RETURN, 0, teacher)]
    points += [(OFFLINE_RETURN, step, value) for step, value in offline]
    points += [(EPISODIC_RETURN, step, value) for step, value in games]
    points += [] if last_step is None else [(EPSILON, last_step, 0.01)]
    points += [(EVALUATION_RETURN, number, value) for number, value in enumerate(evaluation)]
    with SummaryWriter(str(run)) as writer:
        writer.add_text("hyperparameters", "\n".join(rows))
        for tag, step, value in points:
            writer.add_scalar(tag, value, step)
    return run


def groups_under(folder: Path) -> list[Group]:
    return group_runs(find_runs([folder], include_unfinished=False).runs)
