"""Asks the services that a run will need, before it starts."""

from typing import Any

from cleanrl.utils.hub.card import repo_name
from cleanrl.utils.hub.publish import check_upload
from cleanrl.utils.run.tracking import check_tracking


def check_services(args: Any) -> None:
    """Ensures that Weights & Biases and the Hub will take what the script's options ask for.

    `hf_entity` becomes the token's user, unless it is given.

    Raises:
        SystemExit: with a one-line error, if they will not.
    """
    if args.track:
        check_tracking(args.wandb_project_name)
    if args.upload_model:
        args.hf_entity, _, _ = check_upload(repo_name(args), args.hf_entity).partition("/")
