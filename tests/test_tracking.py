"""--track hands the run over to Weights & Biases."""

import sys
from types import SimpleNamespace

import pytest

from cleanrl.utils.tracking import start_tracking


def test_wandb_follows_tensorboard(monkeypatch):
    started = {}
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **settings: started.update(settings))
    )
    start_tracking("run", "project", None, {"seed": 1})
    assert started["sync_tensorboard"] is True
    assert (started["name"], started["project"], started["config"]) == ("run", "project", {"seed": 1})


def test_without_wandb_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match=r"^error: --track .*pip install wandb"):
        start_tracking("run", "project", None, {})
