"""Publishes a finished run on the Hugging Face Hub, as --upload-model of the training scripts does.

Everything that is published lies in the run's folder, so a failed upload can be repeated:

    python -m cleanrl.utils.hub.publish runs/PongNoFrameskip-v4__qdagger_dqn_atari_impalacnn__1__1700000000
"""

import glob
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro
from huggingface_hub import HfApi, constants, get_token, whoami
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from cleanrl.utils.bounds import shown
from cleanrl.utils.hub.card import read_card
from cleanrl.utils.hub.client import ask_the_hub, silence_limit_s, without_password
from cleanrl.utils.shell import prepare_command
from cleanrl.utils.storage import write_durably

PUBLISHED = ["README.md", "pyproject.toml", "poetry.lock", "videos/*/*.mp4", "events.out.tfevents.*"]
LEAST_BYTES_PER_S = 50_000  # an upload slower than this is given up


def check_upload(name: str, entity: str | None) -> str:
    """The id of the repo `name` of `entity` (default: the token's user), once the Hub accepts it.

    Raises:
        SystemExit: with a one-line error if there is no token, the Hub cannot be reached or refuses the
            token, or the token cannot write to the entity's repos.
    """
    if get_token() is None and not constants.HF_HUB_OFFLINE:
        refuse_upload("there is no token; run hf auth login, or set HF_TOKEN to a token with write access")
    try:
        account = ask_the_hub(whoami, silence_limit_s())
    except Exception as error:
        refuse_upload(_explain(error))
    try:
        user = shown(account["name"])
        role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
        organizations = [org for org in account.get("orgs") or [] if org.get("roleInOrg") != "read"]
        writable = [user, *(shown(org["name"]) for org in organizations)]
    except (AttributeError, KeyError, TypeError):
        refuse_upload(
            f"{constants.ENDPOINT} does not answer like the Hub; check HF_ENDPOINT, proxy and firewall"
        )
    entity = entity or user
    if role == "read":
        refuse_upload(f"the token of {user} is read-only; set HF_TOKEN to one with write access")
    if entity not in writable:
        refuse_upload(f"{user} may not write to --hf-entity {entity}; use one of {', '.join(writable)}")
    try:
        validate_repo_id(f"{entity}/{name}")
    except HFValidationError:
        refuse_upload(
            f"{name} is not a valid repo name; use only letters, digits, - _ . in --exp-name, 96 in all"
        )
    return f"{entity}/{name}"


def refuse_upload(fault: str) -> NoReturn:
    raise SystemExit(without_password(f"error: cannot upload to the Hub: {fault}"))


def upload(folder: Path, entity: str | None = None) -> None:
    """Publishes a run whose model card is written; replaces event files and videos of an earlier run.

    Args:
        folder: the run's.
        entity: the user or organization (default: the one in the card).

    Raises:
        SystemExit: with a one-line error that says how to try again.
    """
    again = f"python -m cleanrl.utils.hub.publish {shlex.quote(str(folder))}"
    card = read_card(folder)
    carded_entity, _, name = card.repo_id.partition("/")
    try:
        repo_id = check_upload(name, entity or carded_entity)
    except SystemExit as fault:
        raise SystemExit(f"{fault}; nothing is lost, upload it later with {again}") from None
    if repo_id != card.repo_id:
        write_durably(folder / "README.md", card.text.replace(card.repo_id, repo_id).encode())
    files = files_to_publish(folder, card.files)
    num_bytes = sum((folder / file).stat().st_size for file in files)

    def publish() -> None:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(file) for file in files],
            delete_patterns=["events.out.tfevents.*", "videos/*"],  # of an earlier run
            commit_message=f"Upload {folder.name}",
        )

    print(without_password(f"uploading to {constants.ENDPOINT}/{repo_id} (to repeat: {again})"))
    disable_progress_bars()
    try:
        ask_the_hub(publish, silence_limit_s() + num_bytes / LEAST_BYTES_PER_S)
    except Exception as error:
        refuse_upload(f"{_explain(error)}; nothing is lost, upload it later with {again}")
    print(without_password(f"uploaded: {constants.ENDPOINT}/{repo_id}"))


def files_to_publish(folder: Path, named: Sequence[str]) -> list[str]:
    """Paths in a run's folder: of its `PUBLISHED` places, and of files `named` by its card; no links."""
    found = {path for place in [*PUBLISHED, *map(glob.escape, named)] for path in folder.glob(place)}
    root = folder.resolve()
    files = (path.relative_to(folder) for path in sorted(found) if path.is_file())
    return [file.as_posix() for file in files if (root / file).resolve() == root / file]


def _explain(error: Exception) -> str:
    """The fault and what to do about it, in one line."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # for a large file the client only says which one
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set; unset it"
        case HfHubHTTPError() if status in (401, 403):
            return f"the Hub refuses the token ({status}); set HF_TOKEN to one with write access there"
        case HfHubHTTPError():
            return f"{constants.ENDPOINT} answered with error {status}; try again later"
        case TimeoutError():
            return f"{constants.ENDPOINT} stopped answering ({error}); check the connection and HF_ENDPOINT"
        case _:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{constants.ENDPOINT}: {text}; check the connection and HF_ENDPOINT"


@dataclass
class Args:
    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder, runs/…, of a run that has finished with --upload-model"""
    hf_entity: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = None
    """user or organization on the Hub (default: the one the run was trained for)"""


if __name__ == "__main__":
    prepare_command()
    options = tyro.cli(Args, prog="python -m cleanrl.utils.hub.publish", description=__doc__)
    upload(options.run_folder, options.hf_entity)
