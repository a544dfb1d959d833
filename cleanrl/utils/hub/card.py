"""What is added to a run's folder for publishing: its sources and the model card, README.md."""

import dataclasses
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cleanrl.utils.storage import write_durably

ROOT = Path(__file__).resolve().parents[3]


class Card(NamedTuple):
    """The card of a run that is complete."""

    text: str
    repo_id: str
    files: list[str]
    """the run's model and script"""


def repo_name(args: Any) -> str:
    """As published models are named; `args` are a script's."""
    return f"{args.env_id}-{args.exp_name}-seed{args.seed}"


def copy_sources(folder: Path, script: Path) -> None:
    """Copies what a run is made with into its folder: the script as it runs, and the packages' versions."""
    for path in (script, ROOT / "pyproject.toml", ROOT / "poetry.lock"):
        if path.exists():
            (folder / path.name).unlink(missing_ok=True)  # nothing is written through a link
            shutil.copy(path, folder)


def write_card(folder: Path, repo_id: str, args: Any, script: Path, returns: Sequence[float]) -> None:
    """Writes the model card into a run's folder; `returns` are those of the final evaluation's games."""
    method = "QDagger" if script.stem.startswith("qdagger") else "DQN"
    mean, std = np.mean(returns), np.std(returns)
    data = ModelCardData(
        model_name=repo_id.partition("/")[2],
        tags=[args.env_id, "deep-reinforcement-learning", "reinforcement-learning", "atari", method.lower()],
        pipeline_tag="reinforcement-learning",
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=args.env_id,
                dataset_name=args.env_id,
                metric_type="mean_reward",
                metric_name="mean_reward",
                metric_value=f"{mean:.2f} +/- {std:.2f}",
                metric_args={"games": len(returns)},
            )
        ],
    )
    options = "\n".join(f"| `{name}` | {as_text(value)} |" for name, value in vars(args).items())
    text = f"""---
{data.to_yaml()}
---

# {method} on {args.env_id}

Mean return **{mean:.2f} ± {std:.2f}** (standard deviation) over the {len(returns)} games of the final
evaluation: whole games, rewards unclipped, ε = {args.end_e}.
The returns: {", ".join(f"{value:.10g}" for value in returns)}.

## Watch it play

In a checkout of the code that `{script.name}` is from:

```bash
python cleanrl/enjoy.py {repo_id}
```

## Train it again

```bash
{command_line(args, script)}
```

| file | |
|---|---|
| `{args.exp_name}.cleanrl_model` | the weights |
| `{script.name}` | the script as it ran |
| `pyproject.toml`, `poetry.lock` | the packages it ran with |
| `events.out.tfevents.*` | the curves, for TensorBoard |
| `videos/` | the first game of each evaluation, if recorded |

## Hyperparameters

| option | value |
|---|---|
{options}
"""
    write_durably(folder / "README.md", text.encode())


def as_text(value: object) -> str:
    """An option's value as Markdown that shows it as it is, and does nothing else."""
    return re.sub(r"[^\w\s./:-]", lambda match: f"&#{ord(match[0])};", str(value))


def read_card(folder: Path) -> Card:
    """Reads what `write_card` wrote.

    Raises:
        SystemExit: with a one-line error if there is no such card.
    """
    try:
        card = ModelCard.load(folder / "README.md")
        name = re.escape(card.data.model_name)
        (repo_id,) = set(re.findall(rf"enjoy\.py (\S+/{name})$", card.content, re.MULTILINE))
        files = re.findall(
            r"^\| `([\w.-]+)` \| the (?:weights|script as it ran) \|$", card.content, re.MULTILINE
        )
    except Exception:
        raise SystemExit(
            f"error: {folder} cannot be uploaded: it is not a finished run with --upload-model"
        ) from None
    return Card(card.content, repo_id, files)


def command_line(args: Any, script: Path) -> str:
    """The command that starts such a run, without options that have their defaults."""
    words = ["python", f"cleanrl/{script.name}"]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        # A preset's options are listed one by one: it would override those that have their defaults again.
        if value == field.default or field.name in ("preset", "resume", "upload_model", "hf_entity"):
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)
