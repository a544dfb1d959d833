"""Each kind of nonsense on the command line is refused with its own line."""

import dataclasses

import pytest

import cleanrl.qdagger_dqn_atari_impalacnn
import cleanrl.qdagger_dqn_atari_jax_impalacnn
from cleanrl.qdagger_dqn_atari_impalacnn import Args
from cleanrl.utils.command_line import check_arguments


@pytest.mark.parametrize(
    "script", [cleanrl.qdagger_dqn_atari_impalacnn, cleanrl.qdagger_dqn_atari_jax_impalacnn]
)
def test_the_defaults_are_fine(script, capsys):
    check_arguments(script.Args())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_outermost_seeds_are_fine(seed):
    check_arguments(dataclasses.replace(Args(), seed=seed))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *[
            ({name: -1}, [f"--{name.replace('_', '-')} -1", "at least"])
            for name in (
                "seed", "num_envs", "total_timesteps", "buffer_size", "n_step", "target_network_frequency",
                "batch_size", "learning_starts", "train_frequency", "teacher_eval_episodes", "teacher_steps",
                "offline_steps", "offline_eval_frequency", "eval_episodes", "distill_steps",
            )
        ],
        *[({name: 0}, ["at least 1"]) for name in ("num_envs", "n_step", "batch_size", "train_frequency")],
        *[
            ({name: value}, [f"--{name.replace('_', '-')} {value}", "between 0 and 1"])
            for name in (
                "repeat_action_probability", "gamma", "tau", "start_e", "end_e", "exploration_fraction"
            )
            for value in (-0.1, 1.5, float("nan"))
        ],
        *[
            ({name: value}, [f"--{name.replace('_', '-')} {value}", "positive"])
            for name in ("temperature", "learning_rate")
            for value in (0.0, -1.0, float("inf"), float("nan"))
        ],
        ({"seed": 2**32}, ["--seed 4294967296", "at most 4294967295"]),
        ({"batch_size": 33, "buffer_size": 32}, ["--batch-size 33", "--buffer-size 32"]),
        ({"buffer_device": "cuda", "cuda": False}, ["--buffer-device cuda", "--no-cuda"]),
        ({"teacher_steps": 10, "n_step": 3, "num_envs": 8}, ["--teacher-steps 10", "--n-step", "24"]),
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(options, words):
    with pytest.raises(SystemExit) as stop:
        check_arguments(dataclasses.replace(Args(), **options))
    message = str(stop.value)
    assert message.startswith("error: --")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_is_only_odd_gets_a_warning(capsys):
    check_arguments(dataclasses.replace(Args(), total_timesteps=100, learning_starts=100))
    assert "nothing will be learned online" in capsys.readouterr().err
