"""A loss or a weight that is not finite ends the run with one line, and costs no good model."""

import signal
from pathlib import Path

import numpy as np
import pytest
from both_scripts import DQN_JAX, DQN_TORCH, JAX, TORCH, is_qdagger, network, set_weights, weights

pytestmark = pytest.mark.usefixtures("one_thread")
QDAGGER, DQN = (TORCH, JAX), (DQN_TORCH, DQN_JAX)


@pytest.mark.parametrize(
    ("scripts", "first_nan", "tag", "step"),
    [
        # Offline there are 17 gradient steps; every fifth loss is plotted, and the last.
        (QDAGGER, 1, "charts/offline/loss", 5),
        (QDAGGER, 5, "charts/offline/loss", 5),
        (QDAGGER, 6, "charts/offline/loss", 10),
        (QDAGGER, 16, "charts/offline/loss", 17),
        # Online the first gradient step comes in environment step 20, and one in every fourth from there on.
        (QDAGGER, 18, "losses/loss", 17 + 20 + 2 * 4),
        (QDAGGER, 21, "losses/loss", 17 + 20 + 7 * 4),
        (DQN, 1, "losses/td_loss", 20 + 4 * 4),
        (DQN, 5, "losses/td_loss", 20 + 4 * 4),
        (DQN, 6, "losses/td_loss", 20 + 9 * 4),
        (DQN, 11, "losses/td_loss", 64),
    ],
)
def test_pytorch_and_jax_name_the_same_step(train, monkeypatch, scripts, first_nan, tag, step):
    """The first whose loss is plotted, when the losses are NaN from a gradient step on."""
    for script in scripts:
        learn = script.learn

        def broken_learn(args, state, *others, learn=learn):
            losses = learn(args, state, *others)
            factor = np.nan if state.gradient_steps >= first_nan else 1.0
            return {name: value * factor for name, value in losses.items()}

        monkeypatch.setattr(script, "LOSS_INTERVAL", 5)
        monkeypatch.setattr(script, "learn", broken_learn)
        options = {"offline_steps": 17} if is_qdagger(script) else {}
        with pytest.raises(SystemExit) as end:
            train(script, script.__name__, **options)
        assert end.value.code == f"error: {tag} is nan at step {step}; try a lower --learning-rate"


@pytest.mark.parametrize(
    ("scripts", "options", "tag", "step"),
    [
        (QDAGGER, {"offline_eval_frequency": 6}, "charts/offline/loss", 6),
        (QDAGGER, {"offline_steps": 0}, "losses/loss", 64),
        (DQN, {}, "losses/td_loss", 64),
    ],
)
def test_learning_that_explodes_ends_the_run_before_its_model_is_saved(train, scripts, options, tag, step):
    for script in scripts:
        line = rf"^error: {tag} is (inf|nan) at step {step}; try a lower --learning-rate$"
        with pytest.raises(SystemExit, match=line):
            train(script, script.__name__, learning_rate=1e30, **options)
        assert not list(Path().rglob("*.cleanrl_model"))


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
@pytest.mark.parametrize("first_bad", [5, 8])
def test_weights_that_are_not_finite_never_replace_a_good_model(
    script, train, monkeypatch, first_bad, number
):
    """Not in an evaluation (QDagger's sixth gradient step is its last offline), and not at the end."""
    learn, models = script.learn, set()

    def broken_learn(args, state, *others):
        losses = learn(args, state, *others)
        if state.gradient_steps >= first_bad:
            broken = {name: array * np.nan for name, array in weights(network(state)).items()}
            for role in ("trained", "ema_student")[: 1 + is_qdagger(script)]:
                set_weights(state, broken, role)
            if number and not models:  # a second signal would end the process at once
                signal.raise_signal(number)
            for suffix in ("-offline", ""):
                models.add(next(Path("runs").iterdir()) / f"{args.exp_name}{suffix}.cleanrl_model")
            for path in models:
                path.write_bytes(b"good")
        return losses

    monkeypatch.setattr(script, "learn", broken_learn)
    with pytest.raises(
        SystemExit, match=r"^error: (the network's weights are not finite; kept|\S+ is nan at)"
    ):
        train(script)
    assert [path.read_bytes() for path in models] == [b"good"] * 2
