"""What a run says at its end."""

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cleanrl.utils.bounds import shown


def summary(args: Any, folder: Path, num_games: int, mean_returns: Mapping[str, float]) -> str:
    """Its returns, and where its model and curves are.

    Args:
        args: the script's.
        folder: the run's.
        num_games: of the final evaluation.
        mean_returns: of the evaluations by name, "final" the last.
    """
    script = Path(inspect.getfile(type(args))).stem
    is_copy = hasattr(args, "teacher_steps") and not script.startswith("qdagger_dqn_atari_")
    option = f" --script {script}" if is_copy else ""  # its network may be another one
    *before, final = mean_returns.values()
    others = ", ".join(f"{shown(name)} {mean:.2f}" for name, mean in zip(mean_returns, before, strict=False))
    lines = [f"final evaluation: mean return {final:.2f} over {num_games} games{others and f' ({others})'}"]
    if args.save_model:
        lines += [
            f"model: {folder / args.exp_name}.cleanrl_model",
            *([f"best: {folder / args.exp_name}-best.cleanrl_model"] if "best" in mean_returns else []),
            f"watch it play: python cleanrl/enjoy.py {shlex.quote(str(folder))}{option}",
        ]
    return "\n".join([*lines, f"curves: tensorboard --logdir {folder.parent}"])
