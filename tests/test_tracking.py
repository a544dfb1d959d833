"""--track hands the curves over to Weights & Biases."""

import sys
from unittest import mock

import pytest

from cleanrl.utils.tracking import start_tracking


def test_wandb_gets_every_point_and_a_resumed_run_stays_one(monkeypatch):
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = start_tracking("run", "project", None, {"seed": 1})
    settings = wandb.init.call_args.kwargs
    assert (settings["name"], settings["project"], settings["config"]) == ("run", "project", {"seed": 1})
    assert (settings["id"], settings["resume"]) == ("run", "allow")
    log("charts/a", 0.5, 10)
    wandb.init().log.assert_called_once_with({"charts/a": 0.5, "step": 10})


def test_without_wandb_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match=r"^error: --track .*pip install wandb"):
        start_tracking("run", "project", None, {})
