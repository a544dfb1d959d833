"""A loss or a weight that is no finite number ends the run with one line, and costs no good model."""

import signal
from pathlib import Path

import numpy as np
import pytest
from both_scripts import DQN_JAX, DQN_TORCH, JAX, TORCH, is_qdagger, network, set_weights, weights

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = pytest.mark.parametrize("scripts", [(TORCH, JAX), (DQN_TORCH, DQN_JAX)], ids=["qdagger", "dqn"])


def end_of_a_run_with_nan(script, train, monkeypatch, first_nan: int, **options) -> str:
    """The line with which a run ends whose losses are NaN from a gradient step on; every fifth is plotted."""
    learn = script.learn

    def broken_learn(args, state, *others):
        losses = learn(args, state, *others)
        factor = np.nan if state.gradient_steps >= first_nan else 1.0
        return {name: value * factor for name, value in losses.items()}

    monkeypatch.setattr(script, "LOSS_INTERVAL", 5)
    monkeypatch.setattr(script, "learn", broken_learn)
    with pytest.raises(SystemExit) as end:
        train(script, script.__name__, **options)
    return end.value.code


@PAIRS
@pytest.mark.parametrize("first_nan", [1, 5, 6, 9, 17, 20])
def test_both_scripts_name_the_same_step(scripts, train, monkeypatch, first_nan):
    """The first whose loss was plotted. One in four environment steps is one of learning, from step 20 on."""
    lines = [end_of_a_run_with_nan(script, train, monkeypatch, first_nan, offline_steps=17, total_timesteps=120)
             for script in scripts]
