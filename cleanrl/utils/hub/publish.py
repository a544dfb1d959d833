"""Publishes a finished run on the Hugging Face Hub: `--upload-model` of the training scripts.

All that is published lies in the run's folder, so that a failed upload can be made up for:

    python -m cleanrl.utils.hub.publish runs/PongNoFrameskip-v4__qdagger_dqn_atari_impalacnn__1__1700000000
"""

import dataclasses
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import tyro
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token, whoami
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from cleanrl.utils.hub.download import ask_the_hub, silence_limit_s
from cleanrl.utils.signals import exit_on_ctrl_c
from cleanrl.utils.storage import write_durably

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = [
    "README.md",
    "*.cleanrl_model",
    "*.py",
    "pyproject.toml",
    "poetry.lock",
    "videos/*.mp4",
    "events.out.tfevents.*",
]
NOT_PUBLISHED = ["*-offline.cleanrl_model", "checkpoints/*"]
LEAST_BYTES_PER_S = 50_000  # of an upload that is not given up


def repo_name(args: Any) -> str:
    """As the published models are named; `args` are a script's."""
    return f"{args.env_id}-{args.exp_name}-seed{args.seed}"


def check_upload(name: str, entity: str | None) -> str:
    """The repo's id, `entity` (by default the token's user) and `name`, if the Hub will take it.

    Raises:
        SystemExit: with one line, if there is no token, the Hub cannot be reached or refuses the token, or
            the token cannot write to the entity's repos.
    """
    if get_token() is None and not constants.HF_HUB_OFFLINE:
        refuse_upload("there is no token; run hf auth login, or set HF_TOKEN to a token that may write")
    try:
        account = ask_the_hub(whoami, silence_limit_s())
    except Exception as error:
        refuse_upload(_explain(error))
    user = account["name"]
    entity = entity or user
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        refuse_upload(f"the token of {user} may only read; set HF_TOKEN to one that may write")
    writable = [user, *(org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read")]
    if entity not in writable:
        refuse_upload(f"{user} may not write to --hf-entity {entity}; use one of {', '.join(writable)}")
    try:
        validate_repo_id(f"{entity}/{name}")
    except HFValidationError:
        refuse_upload(
            f"{name} is no name of a repo; use only letters, digits, - _ . in --exp-name, 96 in all"
        )
    return f"{entity}/{name}"


def refuse_upload(fault: str) -> NoReturn:
    raise SystemExit(f"error: no upload to the Hub: {fault}")


def copy_sources(folder: Path, script: Path) -> None:
    """Keeps in a run's folder what it was made with: the script as it runs, and the packages' versions."""
    for path in (script, ROOT / "pyproject.toml", ROOT / "poetry.lock"):
        if path.exists():
            shutil.copy(path, folder)


def command_line(args: Any, script: Path) -> str:
    """The command that starts such a run: what differs from the defaults."""
    words = ["python", f"cleanrl/{script.name}"]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value == field.default or field.name in ("resume", "upload_model", "hf_entity"):
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def write_card(folder: Path, repo_id: str, args: Any, script: Path, returns: Sequence[float]) -> None:
    """Writes the model card, README.md, into a run's folder; `returns` are the final evaluation's."""
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
    options = "\n".join(f"| `{name}` | {value} |" for name, value in vars(args).items())
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
python -m cleanrl.enjoy --hf-repo {repo_id}
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
| `videos/` | the first game of each evaluation, if it was recorded |

## Hyperparameters

| option | value |
|---|---|
{options}
"""
    write_durably(folder / "README.md", text.encode())


def upload(folder: Path, entity: str | None = None) -> None:
    """Publishes a run that `write_card` was called for, and replaces what its repo held of another run.

    Args:
        folder: the run's.
        entity: the user or organization; by default the one that its card names.

    Raises:
        SystemExit: with one line that says how to try again.
    """
    again = f"python -m cleanrl.utils.hub.publish {shlex.quote(str(folder))}"
    try:
        card = ModelCard.load(folder / "README.md")
        name = card.data.model_name
        (carded_id,) = set(re.findall(rf"--hf-repo (\S+/{re.escape(name)})$", card.content, re.MULTILINE))
    except Exception:
        raise SystemExit(
            f"error: {folder} cannot be uploaded: it is no run that came to its end with --upload-model"
        ) from None
    try:
        repo_id = check_upload(name, entity or carded_id.partition("/")[0])
    except SystemExit as fault:
        raise SystemExit(f"{fault}; nothing is lost, upload it later with {again}") from None
    if repo_id != carded_id:
        write_durably(folder / "README.md", card.content.replace(carded_id, repo_id).encode())
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def publish() -> None:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=PUBLISHED,
            ignore_patterns=NOT_PUBLISHED,
            delete_patterns=["events.out.tfevents.*", "videos/*"],  # of an earlier run
            commit_message=f"Upload {folder.name}",
        )

    print(f"uploading to {constants.ENDPOINT}/{repo_id} (to do it again: {again})")
    disable_progress_bars()
    try:
        ask_the_hub(publish, silence_limit_s() + num_bytes / LEAST_BYTES_PER_S)
    except Exception as error:
        raise SystemExit(
            f"error: no upload to the Hub: {_explain(error)}; nothing is lost, upload it later with {again}"
        ) from None
    print(f"uploaded: {constants.ENDPOINT}/{repo_id}")


def _explain(error: Exception) -> str:
    """What went wrong and what to do about it, in one line."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of a large file: the client says only which
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set; unset it"
        case HfHubHTTPError() if status in (401, 403):
            return f"the Hub refuses the token ({status}); set HF_TOKEN to one that may write there"
        case HfHubHTTPError():
            return f"{constants.ENDPOINT} answered with error {status}; try again later"
        case TimeoutError():
            return f"{constants.ENDPOINT} stopped answering ({error}); check the connection and HF_ENDPOINT"
        case _:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{constants.ENDPOINT}: {text}; check the connection and HF_ENDPOINT"


@dataclass
class Args:
    run_folder: Annotated[Path, tyro.conf.Positional]
    """the folder, runs/…, of a run that came to its end with --upload-model"""
    hf_entity: str | None = None
    """user or organization on the Hub (default: the one that it was trained for)"""


if __name__ == "__main__":
    exit_on_ctrl_c()
    options = tyro.cli(Args, description=__doc__)
    upload(options.run_folder, options.hf_entity)
