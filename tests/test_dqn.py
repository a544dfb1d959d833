"""Both DQN scripts: against the formulas, Stable-Baselines3's buffer, the QDagger scripts and each other."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import flax.linen
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.serialization import msgpack_restore
from stable_baselines3.common.buffers import ReplayBuffer as StableBaselines3Buffer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleanrl import dqn_atari, dqn_atari_jax, qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn
from cleanrl.utils.games.parallel_envs import FinishedGame, StepResult, WorkerError
from cleanrl.utils.replay.rows import open_replay
from cleanrl.utils.signals import Stopped
from cleanrl.utils.weights.layouts import flatten, to_flax, to_torch, unflatten

ROOT = Path(__file__).resolve().parents[1]
NUM_ACTIONS = 6
PUBLISHED = {
    "env_id": "BreakoutNoFrameskip-v4",
    "total_timesteps": 10_000_000,
    "learning_rate": 1e-4,
    "buffer_size": 1_000_000,
    "gamma": 0.99,
    "tau": 1.0,
    "target_network_frequency": 1000,
    "batch_size": 32,
    "start_e": 1.0,
    "end_e": 0.01,
    "exploration_fraction": 0.10,
    "learning_starts": 80_000,
    "train_frequency": 4,
}
TAGS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/epsilon",
    "charts/SPS",
    "losses/td_loss",
    "losses/q_values",
    "eval/episodic_return",
}
Weights = dict[str, np.ndarray]
Arrays = dict[str, np.ndarray]


class TorchScalar(torch.nn.Module):
    """A network that is one number, its Q-value of everything: what was learned when can be read off it."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.num_actions = num_actions
        self.number = torch.nn.Parameter(torch.ones(1))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.number + torch.zeros(len(observations), self.num_actions)


class JaxScalar(flax.linen.Module):
    num_actions: int

    @flax.linen.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        number = self.param("number", lambda key: jnp.ones(1))
        return jnp.broadcast_to(number, (len(observations), self.num_actions))


def pixels(observations: Any) -> Any:
    """Some pixels of every frame, (batch, 196) between 0 and 1."""
    return observations[:, :, ::12, ::12].reshape(len(observations), -1) / 255.0


class TorchLinear(torch.nn.Module):
    def __init__(self, num_actions: int):
        super().__init__()
        self.linear = torch.nn.Linear(196, num_actions)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.linear(pixels(observations))


class JaxLinear(flax.linen.Module):
    num_actions: int

    @flax.linen.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        return flax.linen.Dense(self.num_actions)(pixels(observations))


class TorchScript:
    module: ModuleType = dqn_atari
    qdagger: ModuleType = qdagger_dqn_atari_impalacnn
    Scalar, Linear = TorchScalar, TorchLinear
    kernel, bias = "linear.weight", "linear.bias"  # of Linear
    other_frameworks = ("jax", "jaxlib", "flax", "optax")

    def create_replay(self, capacity: int, num_envs: int) -> Any:
        return self.module.ReplayBuffer(capacity, num_envs, torch.device("cpu"))

    def create_state(self, args: Any, capacity: int = 60) -> Any:
        replay = self.create_replay(capacity, args.num_envs)
        return self.module.create_train_state(args, NUM_ACTIONS, replay, torch.device("cpu"))

    def weights(self, state: Any, name: str = "q_network") -> Weights:
        """In the script's own names; a copy."""
        network = getattr(state, name)
        return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}

    def set_weights(self, state: Any, name: str, weights: Weights) -> None:
        getattr(state, name).load_state_dict({name: torch.tensor(w) for name, w in weights.items()})

    def update(self, state: Any, batch: Arrays, args: Any) -> dict[str, float]:
        batch = self.module.Batch(**{name: torch.tensor(values) for name, values in batch.items()})
        return {name: value.item() for name, value in self.module.update(args, state, batch).items()}

    def q_values(self, state: Any, observations: np.ndarray) -> np.ndarray:
        return self.module.compute_q_values(state.q_network, torch.device("cpu"), observations)

    def teacher_q_values(self, weights: Weights, observations: np.ndarray) -> np.ndarray:
        """Those of the QDagger script's teacher."""
        teacher = self.qdagger.TeacherNetwork(NUM_ACTIONS)
        teacher.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        return self.qdagger.compute_q_values(teacher, torch.device("cpu"), observations)

    def load_teacher(self, path: Path, num_actions: int, observations: np.ndarray) -> np.ndarray:
        """The Q-values of the teacher that the QDagger script makes of a file."""
        args = self.qdagger.Args(teacher_model_path=path)
        teacher = self.qdagger.load_teacher(args, num_actions, torch.device("cpu"))
        return self.qdagger.compute_q_values(teacher, torch.device("cpu"), observations)

    def read_model(self, path: Path) -> Weights:
        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}

    def start(self, replay: Any, observations: np.ndarray) -> Any:
        replay.start(observations)
        return replay

    def add(self, replay: Any, *step: Any) -> Any:
        replay.add(*step)
        return replay

    def draw(self, replay: Any, batch_size: int) -> np.ndarray:
        return replay.draw(batch_size, np.random.default_rng(0))

    def gather(self, replay: Any, slots: np.ndarray) -> Any:
        return type(batch := replay.gather(torch.from_numpy(slots)))(*(values.numpy() for values in batch))

    def qdagger_replay(self, capacity: int, num_envs: int) -> Any:
        device = torch.device("cpu")
        return self.qdagger.ReplayBuffer(capacity, num_envs, NUM_ACTIONS, 1, 0.9, device)

    def record_epsilon(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The list to which every ε that is acted on will be appended."""
        recorded, explore = [], self.module.explore

        def recording_explore(rng, epsilon, q_values):
            recorded.extend(np.broadcast_to(epsilon, len(q_values)))
            return explore(rng, epsilon, q_values)

        monkeypatch.setattr(self.module, "explore", recording_explore)
        return recorded


jax_draw = jax.jit(lambda replay, key, batch_size: replay.draw(key, batch_size), static_argnames="batch_size")
jax_gather = jax.jit(lambda replay, slots: replay.gather(slots))


class JaxScript:
    module: ModuleType = dqn_atari_jax
    qdagger: ModuleType = qdagger_dqn_atari_jax_impalacnn
    Scalar, Linear = JaxScalar, JaxLinear
    kernel, bias = "params/Dense_0/kernel", "params/Dense_0/bias"
    other_frameworks = ("torch",)

    @property
    def device(self) -> jax.Device:
        return jax.devices("cpu")[0]

    def create_replay(self, capacity: int, num_envs: int) -> Any:
        return self.module.ReplayBuffer.create(capacity, num_envs, self.device)

    def create_state(self, args: Any, capacity: int = 60) -> Any:
        replay = self.create_replay(capacity, args.num_envs)
        return self.module.create_train_state(args, NUM_ACTIONS, replay, self.device)

    def weights(self, state: Any, name: str = "q_network") -> Weights:
        params = flatten(getattr(state.learner, name).params)
        return {name: np.array(array) for name, array in params.items()}

    def set_weights(self, state: Any, name: str, weights: Weights) -> None:
        function = getattr(state.learner, name)
        params = jax.device_put(unflatten(weights), self.device)
        state.learner = state.learner.replace(**{name: function.replace(params=params)})

    def update(self, state: Any, batch: Arrays, args: Any) -> dict[str, float]:
        batch, settings = self.module.Batch(**batch), self.module.Settings.of(args)
        state.learner, results = self.module.update_alone(state.learner, batch, np.float32(0), settings)
        return {name: float(value) for name, value in results.items()}

    def q_values(self, state: Any, observations: np.ndarray) -> np.ndarray:
        return self.module.compute_q_values(state.learner.q_network, observations)

    def teacher_q_values(self, weights: Weights, observations: np.ndarray) -> np.ndarray:
        teacher = self.qdagger.QFunction(unflatten(weights), self.qdagger.TeacherNetwork(NUM_ACTIONS))
        return self.qdagger.compute_q_values(teacher, observations)

    def load_teacher(self, path: Path, num_actions: int, observations: np.ndarray) -> np.ndarray:
        args = self.qdagger.Args(teacher_model_path=path)
        teacher = self.qdagger.load_teacher(args, num_actions, self.device)
        return self.qdagger.compute_q_values(teacher, observations)

    def read_model(self, path: Path) -> Weights:
        return flatten(msgpack_restore(path.read_bytes()))

    def start(self, replay: Any, observations: np.ndarray) -> Any:
        return replay.start(observations)

    def add(self, replay: Any, *step: Any) -> Any:
        return replay.add(*step)

    def draw(self, replay: Any, batch_size: int) -> np.ndarray:
        return np.asarray(jax_draw(replay, jax.random.key(0), batch_size))

    def gather(self, replay: Any, slots: np.ndarray) -> Any:
        # Compiled for one number of slots only, which is that of all.
        batch = jax_gather(replay, np.resize(slots, len(replay.frames)))
        return type(batch)(*(np.asarray(values)[: len(slots)] for values in batch))

    def qdagger_replay(self, capacity: int, num_envs: int) -> Any:
        return self.qdagger.ReplayBuffer.create(capacity, num_envs, NUM_ACTIONS, 1, 0.9, self.device)

    def record_epsilon(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        recorded, act = [], self.module.act

        def recording_act(q_function, observations, epsilon, key):
            recorded.extend(np.broadcast_to(epsilon, len(observations)))
            return act(q_function, observations, epsilon, key)

        monkeypatch.setattr(self.module, "act", recording_act)
        return recorded


pytestmark = pytest.mark.usefixtures("one_thread")

TORCH, JAX = TorchScript(), JaxScript()
Script = TorchScript | JaxScript


@pytest.fixture(params=[TORCH, JAX], ids=["torch", "jax"])
def script(request) -> Script:
    return request.param


def run(folder: Path, *command: str, **settings: str) -> tuple[int, str, str]:
    process = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | settings,
    )  # fmt: skip
    return process.returncode, process.stdout, process.stderr


def only_run(folder: Path) -> Path:
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def read_events(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---------------------------------------------------------------------------------- options and structure


def test_the_defaults_are_the_published_ones(script):
    defaults = vars(script.module.Args())
    assert PUBLISHED.items() <= defaults.items()
    assert defaults["exp_name"] == Path(script.module.__file__).stem
    assert defaults["save_model"]
    assert defaults["save_replay"] is None


def test_both_scripts_take_the_same_options():
    lines = [inspect.getsource(script.module.Args).splitlines() for script in (TORCH, JAX)]
    differing = [(mine.strip(), other.strip()) for mine, other in zip(*lines, strict=True) if mine != other]
    assert differing == [
        (
            '"""let cuDNN use only deterministic algorithms"""',
            '"""let XLA use only deterministic operations on a GPU"""',
        )
    ]


def test_an_option_that_qdagger_has_too_has_the_same_default(script):
    defaults, defaults_of_qdagger = vars(script.module.Args()), vars(script.qdagger.Args())
    shared = (defaults.keys() & defaults_of_qdagger.keys()) - {"exp_name"}
    assert defaults.keys() - shared == {"exp_name", "save_replay"}
    assert {name: defaults[name] for name in shared} == {name: defaults_of_qdagger[name] for name in shared}


def test_the_layout_holds_the_curves_of_training_each_once(script):
    tags = [tag for charts in script.module.LAYOUT.values() for chart in charts.values() for tag in chart]
    expected = (TAGS | {"charts/episodic_return"}) - {"eval/episodic_return", "charts/episodic_length"}
    assert sorted(tags) == sorted(expected)


def test_the_environment_is_the_same_text_as_in_the_qdagger_scripts(script):
    """So that what test_environment.py says of those scripts holds for these."""

    def environment(module: ModuleType) -> str:
        text = Path(module.__file__).read_text()
        (section,) = re.findall(r"^# -+ environment\n(.*)^# -+ networks\n", text, re.DOTALL | re.MULTILINE)
        return section

    assert environment(script.module) == environment(script.qdagger)
    assert environment(script.module).count("\nclass ") == 8
    for function in ("linear_schedule", "explore", "compute_q_values"):
        sources = [inspect.getsource(getattr(module, function)) for module in (script.module, script.qdagger)]
        assert sources[0] == sources[1]


def test_importing_the_scripts_has_no_effects(tmp_path):
    code = """
import multiprocessing, os, signal, sys, threading
from cleanrl import dqn_atari, dqn_atari_jax
assert os.listdir() == []
assert threading.active_count() == 1
assert not multiprocessing.active_children()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert not sys.modules["torch"].cuda.is_initialized()
"""
    assert run(tmp_path, "-c", code, PYTHONPATH=str(ROOT)) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_envs": 0}, "--num-envs 0 must be at least 1"),
        ({"total_timesteps": 0}, "--total-timesteps 0 must be at least 1"),
        ({"learning_starts": -1}, "--learning-starts -1 must be at least 0"),
        ({"eval_episodes": 0}, "--eval-episodes 0 must be at least 1"),
        ({"train_frequency": 0}, "--train-frequency 0 must be at least 1"),
        ({"target_network_frequency": 0}, "--target-network-frequency 0 must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0 must be a positive number"),
        ({"learning_rate": float("nan")}, "--learning-rate nan must be a positive number"),
        ({"gamma": 1.5}, "--gamma 1.5 must lie between 0 and 1"),
        ({"end_e": -0.1}, "--end-e -0.1 must lie between 0 and 1"),
        ({"exploration_fraction": 2.0}, "--exploration-fraction 2.0 must lie between 0 and 1"),
        ({"checkpoint_interval": -1.0}, "--checkpoint-interval -1.0 must be a number of at least 0"),
        ({"batch_size": 8, "buffer_size": 7}, "--batch-size 8 must not exceed --buffer-size 7"),
        ({"buffer_device": "cuda", "cuda": False}, "--buffer-device cuda contradicts --no-cuda"),
        ({"env_id": "PongNoFrameskip"}, "--env-id PongNoFrameskip is not known; did you mean Pong"),
    ],
)
def test_nonsense_ends_in_one_line_before_any_work_is_done(script, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        script.module, "training_run", mock.Mock(side_effect=AssertionError("a run was started"))
    )
    with pytest.raises(SystemExit) as end:
        script.module.main(script.module.Args(**options))
    assert end.value.code.startswith(f"error: {line}")
    assert "\n" not in end.value.code
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- network and learning


def some_batch(size: int, rng: np.random.Generator) -> Arrays:
    return {
        "observations": rng.integers(256, size=(size, 4, 84, 84), dtype=np.uint8),
        "actions": rng.integers(NUM_ACTIONS, size=size),
        "rewards": rng.choice([-1, 0, 1], size).astype(np.float32),
        "next_observations": rng.integers(256, size=(size, 4, 84, 84), dtype=np.uint8),
        "terminations": (np.arange(size) % 3 == 1).astype(np.float32),
    }


def test_the_network_has_the_published_names_and_shapes(script):
    layers = [
        ("network.0", "Conv_0", (8, 8, 4, 32)),
        ("network.2", "Conv_1", (4, 4, 32, 64)),
        ("network.4", "Conv_2", (3, 3, 64, 64)),
        ("network.7", "Dense_0", (3136, 512)),
        ("network.9", "Dense_1", (512, NUM_ACTIONS)),
    ]
    shapes = {}
    for torch_name, flax_name, (*size, inputs, outputs) in layers:
        if script is TORCH:
            shapes |= {f"{torch_name}.weight": (outputs, inputs, *size), f"{torch_name}.bias": (outputs,)}
        else:
            kernel = (*size, inputs, outputs)
            shapes |= {f"params/{flax_name}/kernel": kernel, f"params/{flax_name}/bias": (outputs,)}
    weights = script.weights(script.create_state(script.module.Args()))
    assert {name: array.shape for name, array in weights.items()} == shapes
    assert all(array.dtype == np.float32 for array in weights.values())


def test_the_network_is_qdaggers_teacher(script):
    state = script.create_state(script.module.Args())
    observations = some_batch(8, np.random.default_rng(0))["observations"]
    q_values = script.q_values(state, observations)
    assert q_values.shape == (8, NUM_ACTIONS)
    expected = script.teacher_q_values(script.weights(state), observations)
    np.testing.assert_allclose(q_values, expected, rtol=1e-5, atol=1e-6)


def test_network_and_target_network_start_alike_but_apart(script):
    state = script.create_state(script.module.Args())
    start = script.weights(state)
    assert all(
        np.array_equal(start[name], array) for name, array in script.weights(state, "target_network").items()
    )
    script.set_weights(state, "q_network", {name: array + 1 for name, array in start.items()})
    assert all(
        np.array_equal(start[name], array) for name, array in script.weights(state, "target_network").items()
    )


def test_updates_are_adam_steps_down_the_mean_squared_td_error(script, monkeypatch):
    """Of a linear network, in NumPy's float64: its gradient can be written down."""
    monkeypatch.setattr(script.module, "QNetwork", script.Linear)
    args = script.module.Args(gamma=0.9, learning_rate=3e-3)
    state, rng, size = script.create_state(args), np.random.default_rng(0), 8

    def as_script_has_it(kernel: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(kernel.T if script is TORCH else kernel)

    kernel, target_kernel = rng.normal(size=(2, 196, NUM_ACTIONS)).astype(np.float32)
    bias, target_bias = rng.normal(size=(2, NUM_ACTIONS)).astype(np.float32)
    for name, *arrays in [("q_network", kernel, bias), ("target_network", target_kernel, target_bias)]:
        script.set_weights(state, name, {script.kernel: as_script_has_it(arrays[0]), script.bias: arrays[1]})

    parameters = [kernel.astype(np.float64), bias.astype(np.float64)]
    means, squares = [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters]
    for step in range(1, 4):
        batch = some_batch(size, rng)
        x, next_x = pixels(batch["observations"]), pixels(batch["next_observations"])
        next_values = (next_x @ target_kernel.astype(np.float64) + target_bias).max(axis=1)
        targets = batch["rewards"] + 0.9 * (1 - batch["terminations"]) * next_values
        taken = (x @ parameters[0] + parameters[1])[np.arange(size), batch["actions"]]
        slopes = np.zeros((size, NUM_ACTIONS))
        slopes[np.arange(size), batch["actions"]] = 2 * (taken - targets) / size
        for parameter, gradient, mean, square in zip(
            parameters, [x.T @ slopes, slopes.sum(axis=0)], means, squares, strict=True
        ):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            parameter -= 3e-3 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)

        results = script.update(state, batch, args)
        assert results.keys() == {"td_loss", "q_values"}
        assert results["td_loss"] == pytest.approx(np.square(targets - taken).mean(), rel=1e-4)
        assert results["q_values"] == pytest.approx(taken.mean(), rel=1e-4)
        weights = script.weights(state)
        np.testing.assert_allclose(weights[script.kernel], as_script_has_it(parameters[0]), atol=2e-5)
        np.testing.assert_allclose(weights[script.bias], parameters[1], atol=2e-5)
    target = script.weights(state, "target_network")
    np.testing.assert_array_equal(target[script.kernel], as_script_has_it(target_kernel))


def test_both_scripts_learn_the_same_from_the_same():
    args = {script: script.module.Args(learning_rate=1e-3) for script in (TORCH, JAX)}
    states = {script: script.create_state(args[script]) for script in (TORCH, JAX)}
    for name in ("q_network", "target_network"):
        JAX.set_weights(states[JAX], name, to_flax(TORCH.weights(states[TORCH])))
    before = TORCH.weights(states[TORCH])
    rng = np.random.default_rng(0)
    for _ in range(2):
        batch = some_batch(8, rng)
        torch_results, jax_results = (
            script.update(states[script], batch, args[script]) for script in (TORCH, JAX)
        )
        assert torch_results == pytest.approx(jax_results, rel=1e-4)
    weights, jax_weights = TORCH.weights(states[TORCH]), to_torch(JAX.weights(states[JAX]))
    for name, array in weights.items():
        assert np.abs(array - before[name]).max() > 1e-3, name
        # An Adam step is about the learning rate wherever the gradient is not tiny: compare against that.
        assert (np.abs(array - jax_weights[name]) < 2e-5).mean() > 0.99, name


# -------------------------------------------------------------------------------------- when what happens


class NoGame:
    """Stands in for ParallelEnvs: every environment finishes a game every `game_length` steps."""

    def __init__(self, num_envs: int, game_length: int = 10**9):
        self.num_envs, self.game_length = num_envs, game_length
        self.observations = np.zeros((num_envs, 4, 84, 84), np.uint8)
        self.steps = 0

    def reset(self, seed) -> np.ndarray:
        return self.observations

    def step_async(self, actions: np.ndarray) -> None:
        assert actions.shape == (self.num_envs,)
        self.steps += 1

    def step_wait(self) -> StepResult:
        games = []
        if self.steps % self.game_length == 0:
            games = [FinishedGame(i, float(i), 4 * self.game_length) for i in range(self.num_envs)]
        no, reward = np.zeros(self.num_envs, bool), np.full(self.num_envs, 0.25, np.float32)
        return StepResult(self.observations, reward, no, no, self.observations, games)


class NoWriter:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, float(value)))


REHEARSAL = {
    "total_timesteps": 480,
    "learning_starts": 100,
    "train_frequency": 4,
    "target_network_frequency": 40,
    "exploration_fraction": 0.5,
    "learning_rate": 1e-3,
    "gamma": 0.5,
    "batch_size": 8,
}


def rehearse(script: Script, num_envs: int, game_length: int = 10**9, **options):
    """Trains on games of nothing with a network that is one number; every curve, and every ε acted on."""
    args = script.module.Args(num_envs=num_envs, **REHEARSAL | options)
    games, writer, checkpoint = NoGame(num_envs, game_length), NoWriter(), mock.Mock()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script.module, "QNetwork", script.Scalar)
        monkeypatch.setattr(script.module, "LOSS_INTERVAL", 1)
        epsilon = script.record_epsilon(monkeypatch)
        state = script.create_state(args, capacity=96)
        script.module.train(args, state, games, writer, checkpoint)
    assert games.steps * num_envs == state.step >= args.total_timesteps > (games.steps - 1) * num_envs
    assert checkpoint.call_args_list == [mock.call(games)] * games.steps
    return writer.scalars, epsilon, state


def td_losses_by_the_rules(args: Any) -> list[tuple[int, float]]:
    """The environment step and the loss of each gradient step, in float64."""
    number = target = 1.0
    mean = square = 0.0
    losses = []
    for step in range(args.learning_starts + 1, args.total_timesteps + 1):
        if step % args.train_frequency == 0:
            error = number - (0.25 + args.gamma * target)
            losses.append((step, error**2))
            mean, square = 0.9 * mean + 0.1 * 2 * error, 0.999 * square + 0.001 * (2 * error) ** 2
            root = np.sqrt(square / (1 - 0.999 ** len(losses)))
            number -= args.learning_rate * mean / (1 - 0.9 ** len(losses)) / (root + 1e-8)
        if step % args.target_network_frequency == 0:
            target += args.tau * (number - target)
    return losses


@pytest.mark.parametrize(
    ("num_envs", "options"),
    [
        (1, {}),
        (8, {}),
        (3, {"train_frequency": 3, "target_network_frequency": 7, "tau": 0.5, "learning_starts": 37}),
        (8, {"train_frequency": 5, "target_network_frequency": 1, "tau": 0.1, "learning_starts": 0}),
    ],
)
def test_gradient_steps_and_target_updates_come_when_the_rules_say(script, num_envs, options):
    points, _, state = rehearse(script, num_envs, **options)
    expected = td_losses_by_the_rules(script.module.Args(num_envs=num_envs, **REHEARSAL | options))
    assert [step for step, _ in points["losses/td_loss"]] == [step for step, _ in expected]
    np.testing.assert_allclose(points["losses/td_loss"], expected, rtol=1e-4, atol=1e-9)
    assert state.gradient_steps == len(expected)


def test_the_first_gradient_step_comes_after_learning_starts_then_one_every_four(script):
    points, _, _ = rehearse(script, 8)
    assert [step for step, _ in points["losses/td_loss"]] == list(range(104, 481, 4))


def test_epsilon_falls_linearly_over_the_exploration_whatever_the_number_of_environments(script):
    for num_envs in (1, 8):
        points, epsilon, _ = rehearse(script, num_envs)
        expected = [max(0.01, 1 - 0.99 * step / 240) for step in range(480)]
        np.testing.assert_allclose(epsilon, expected)
        assert points["charts/epsilon"] == [(480, pytest.approx(0.01))]


def test_finished_games_are_plotted_at_the_step_of_their_environment(script):
    points, _, state = rehearse(script, 3, game_length=40)
    expected = [(3 * 39 + 120 * game + i + 1, float(i)) for game in range(4) for i in range(3)]
    assert points["charts/episodic_return"] == expected
    assert points["charts/episodic_length"] == [(step, 160.0) for step, _ in expected]
    assert list(state.recent_returns) == ([0.0, 1.0, 2.0] * 4)[-10:]
    assert points.keys() == TAGS - {"eval/episodic_return"}


def test_a_loss_that_is_no_number_any_more_stops_the_run_and_says_where(script):
    with pytest.raises(SystemExit) as end:
        rehearse(script, 8, learning_rate=1e30)
    line = r"error: the loss is (inf|nan) at environment step 1\d\d; try a lower --learning-rate"
    assert re.fullmatch(line, end.value.code)


class WhichActionGame(NoGame):
    """The brightest row of the newest frame says which action is rewarded."""

    def __init__(self, num_envs: int):
        super().__init__(num_envs)
        self.rng = np.random.default_rng(0)
        self.rewards: list[float] = []

    def reset(self, seed) -> np.ndarray:
        self.right = self.rng.integers(NUM_ACTIONS, size=self.num_envs)
        self.observations = np.roll(self.observations, -1, axis=1)
        self.observations[:, -1] = 0
        self.observations[np.arange(self.num_envs), -1, 12 * self.right] = 255
        return self.observations.copy()

    def step_async(self, actions: np.ndarray) -> None:
        self.answer = (actions == self.right).astype(np.float32)
        self.rewards += list(self.answer)

    def step_wait(self) -> StepResult:
        no, observations = np.zeros(self.num_envs, bool), self.reset(0)
        return StepResult(observations, self.answer, no, no, observations, [])


def test_it_learns_which_action_an_observation_asks_for(script, monkeypatch):
    monkeypatch.setattr(script.module, "QNetwork", script.Linear)
    args = script.module.Args(
        num_envs=4, gamma=0.0, learning_rate=1e-2, total_timesteps=1600, learning_starts=100, batch_size=8
    )
    games = WhichActionGame(4)
    script.module.train(args, script.create_state(args, 1600), games, NoWriter(), lambda envs: None)
    assert np.mean(games.rewards[:100]) < 0.4
    assert np.mean(games.rewards[-400:]) > 0.9


# ------------------------------------------------------------------------------------------------ replay


class Step(NamedTuple):
    observations: np.ndarray
    actions: np.ndarray
    result: StepResult
    next_observations: np.ndarray  # where an episode ended, the one that ended it


def random_steps(num_envs: int, num_steps: int, end_probability: float) -> Iterator[Step]:
    """Steps that no two environments, and no two moments, have the same reward in."""
    rng = np.random.default_rng(0)

    def frames() -> np.ndarray:
        return rng.integers(256, size=(num_envs, 1, 84, 84), dtype=np.uint8)

    observations = np.repeat(frames(), 4, axis=1)
    for _ in range(num_steps):
        next_observations = np.concatenate([observations[:, 1:], frames()], axis=1)
        terminations, truncations = rng.random((2, num_envs)) < end_probability
        ended = terminations | truncations
        new_observations, final_observations = next_observations.copy(), np.full_like(next_observations, 7)
        new_observations[ended] = np.repeat(frames(), 4, axis=1)[ended]
        final_observations[ended] = next_observations[ended]
        rewards = rng.normal(size=num_envs).astype(np.float32)
        result = StepResult(new_observations, rewards, terminations, truncations, final_observations, [])
        yield Step(observations, rng.integers(NUM_ACTIONS, size=num_envs), result, next_observations)
        observations = new_observations


@pytest.mark.parametrize(
    ("num_envs", "capacity_per_env", "end_probability"),
    [(1, 30, 0.03), (3, 12, 0.0), (3, 12, 0.03), (3, 12, 0.3)],
)
def test_every_transition_that_can_be_drawn_equals_stable_baselines3s(
    script, num_envs, capacity_per_env, end_probability
):
    num_steps = 100
    stable_baselines3 = StableBaselines3Buffer(
        num_steps * num_envs,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(NUM_ACTIONS),
        device="cpu",
        n_envs=num_envs,
        handle_timeout_termination=True,
    )
    replay = script.create_replay(capacity_per_env * num_envs, num_envs)
    key_of_reward = {}
    # What takes up room: the time of each transition, None for each observation that ended an episode.
    log: list[list[int | None]] = [[] for _ in range(num_envs)]
    for time, step in enumerate(random_steps(num_envs, num_steps, end_probability)):
        if time == 0:
            replay = script.start(replay, step.observations)
        replay = script.add(replay, step.actions, step.result)
        _, rewards, terminations, truncations, _, _ = step.result
        ended = terminations | truncations
        infos = [{"TimeLimit.truncated": timeout} for timeout in truncations & ~terminations]
        stable_baselines3.add(step.observations, step.next_observations, step.actions, rewards, ended, infos)
        for env in range(num_envs):
            key_of_reward[float(rewards[env])] = time, env
            log[env] += [time, None] if ended[env] else [time]
        if time + 1 not in (1, 5, 50, 90, num_steps):
            continue
        all_slots = num_envs * (capacity_per_env + 4)
        slots = np.unique(script.draw(replay, 40 * all_slots))  # misses one: e^-40
        batch = script.gather(replay, slots)
        keys = [key_of_reward[float(reward)] for reward in batch.rewards]
        at = tuple(np.array(keys).T)
        dones = stable_baselines3.dones[at] * (1 - stable_baselines3.timeouts[at])
        np.testing.assert_array_equal(batch.observations, stable_baselines3.observations[at])
        np.testing.assert_array_equal(batch.actions, stable_baselines3.actions[at][:, 0])
        np.testing.assert_array_equal(batch.next_observations, stable_baselines3.next_observations[at])
        np.testing.assert_array_equal(batch.terminations, dones)
        kept = [(t, env) for env in range(num_envs) for t in log[env][-capacity_per_env:] if t is not None]
        assert sorted(keys) == sorted(kept)
    assert len({len(entries) for entries in log}) > 1 or num_envs == 1 or not end_probability
    assert (stable_baselines3.timeouts.any() and dones.size > 0) == (end_probability > 0)


def test_it_draws_what_qdaggers_buffer_draws_of_single_steps(script):
    """Whose draws test_replay.py shows to be uniform."""
    replay, qdaggers = script.create_replay(36, 3), script.qdagger_replay(36, 3)
    nothing = np.zeros((3, NUM_ACTIONS), np.float32)
    for time, step in enumerate(random_steps(3, 40, 0.1)):
        if time == 0:
            replay, qdaggers = (script.start(each, step.observations) for each in (replay, qdaggers))
        replay = script.add(replay, step.actions, step.result)
        qdaggers = script.add(qdaggers, step.actions, step.result, nothing)
        if time not in (3, 39):
            continue
        slots = script.draw(replay, 64)
        np.testing.assert_array_equal(slots, script.draw(qdaggers, 64))
        batch, qdaggers_batch = script.gather(replay, slots[:40]), script.gather(qdaggers, slots[:40])
        for name, values in batch._asdict().items():
            np.testing.assert_array_equal(values, getattr(qdaggers_batch, name), err_msg=name)


# -------------------------------------------------------------------------------------- as users start it


def test_a_whole_command_gives_a_teacher_its_replay_and_its_curves(script, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in script.other_frameworks:
        (hidden / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    options = (
        "--total-timesteps 600 --learning-starts 500 --buffer-size 400 --num-envs 2 --batch-size 8"
        " --eval-episodes 1 --target-network-frequency 100 --save-replay replays/breakout"
    )
    status, output, errors = run(tmp_path, script.module.__file__, *options.split(), PYTHONPATH=str(hidden))
    assert status == 0, errors
    assert "Traceback" not in errors
    assert "mean return" in output

    run_folder = only_run(tmp_path)
    name = Path(script.module.__file__).stem
    assert re.fullmatch(rf"BreakoutNoFrameskip-v4__{name}__1__\d+", run_folder.name)
    files = {path.name for path in run_folder.rglob("*") if "tfevents" not in path.name}
    assert files == {f"{name}.cleanrl_model"}  # no checkpoints of a finished run
    points = read_events(run_folder)
    assert points.keys() == TAGS
    assert [step for step, _ in points["charts/epsilon"]] == [600]
    assert [step for step, _ in points["losses/td_loss"]] == [600]
    assert all(np.isfinite(value) for values in points.values() for _, value in values)

    model = run_folder / f"{name}.cleanrl_model"
    weights = script.read_model(model)
    observations = some_batch(4, np.random.default_rng(0))["observations"]
    with_torch, with_jax = (reader.load_teacher(model, 4, observations) for reader in (TORCH, JAX))
    np.testing.assert_allclose(with_torch, with_jax, rtol=1e-4, atol=1e-5)
    start = script.module.Args(), 4, script.create_replay(8, 1)
    device = torch.device("cpu") if script is TORCH else script.device
    state = script.module.create_train_state(*start, device)
    assert weights.keys() == script.weights(state).keys()
    assert any((weights[name] != array).any() for name, array in script.weights(state).items())
    script.set_weights(state, "q_network", weights)
    np.testing.assert_allclose(script.q_values(state, observations), with_torch, rtol=1e-4, atol=1e-5)

    saved = open_replay(tmp_path / "replays" / "breakout", "BreakoutNoFrameskip-v4", 4, least_rows=400)
    assert saved.num_envs == 2
    assert (saved.heads >= 300).all()
    assert saved.num_rows == 2 * 204
    rows = [rows for _, rows in saved.rows(num_slots=204)]
    assert sum(len(part["frames"]) for part in rows) == 2 * 204
    assert sum(part["is_transition"].sum() for part in rows) >= 2 * 150


TINY = {
    "env_id": "PongNoFrameskip-v4",
    "num_envs": 2,
    "total_timesteps": 64,
    "learning_starts": 16,
    "buffer_size": 40,
    "batch_size": 8,
    "target_network_frequency": 8,
    "eval_episodes": 1,
}


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """Trains a linear network within this process, with evaluations cut off after a few frames.

    Returns the folder where it was started.
    """
    monkeypatch.setattr(script.module, "evaluate", partial(script.module.evaluate, max_game_frames=200))
    monkeypatch.setattr(script.module, "QNetwork", script.Linear)
    monkeypatch.setattr(script.module, "LOSS_INTERVAL", 1)

    def train_in(name: str, **options) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        script.module.main(script.module.Args(**TINY | options))
        return folder

    return train_in


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(script, train):
    one, again = (train(name, save_replay=Path("replay")) for name in ("one", "again"))
    other = train("other", seed=2, save_replay=Path("replay"), save_model=False, eval_episodes=2)
    models = [script.read_model(next(folder.glob("runs/*/*.cleanrl_model"))) for folder in (one, again)]
    assert models[0].keys() == models[1].keys() == {script.kernel, script.bias}
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])
    assert not list(other.rglob("*.cleanrl_model"))
    replays = [
        {path.name: path.read_bytes() for path in (folder / "replay").iterdir()}
        for folder in (one, again, other)
    ]
    assert replays[0] == replays[1]
    assert replays[0] != replays[2]
    points = [read_events(only_run(folder)) for folder in (one, again, other)]
    for tag in ("losses/td_loss", "losses/q_values", "eval/episodic_return"):
        assert points[0][tag] == points[1][tag]
    assert points[0]["losses/td_loss"] != points[2]["losses/td_loss"]
    assert len(points[0]["losses/td_loss"]) == 12
    assert [len(each["eval/episodic_return"]) for each in points] == [1, 1, 2]


@pytest.mark.parametrize(
    ("stop", "status"), [(WorkerError("a worker died"), "error: a worker died; "), (Stopped(2), 130)]
)
@pytest.mark.parametrize("gradient_steps", [0, 5])
def test_a_run_that_is_stopped_leaves_the_network_it_has_learned(
    script, train, tmp_path, monkeypatch, stop, status, gradient_steps
):
    def stopped_train(args, state, *others):
        state.gradient_steps = gradient_steps
        raise stop

    monkeypatch.setattr(script.module, "train", stopped_train)
    with pytest.raises(SystemExit) as end:
        train("stopped", num_envs=1, exp_name="mine", save_replay=Path("replay"))
    assert str(end.value.code).startswith(str(status))
    saved = [path.name for path in tmp_path.rglob("*.cleanrl_model")]
    assert saved == (["mine.cleanrl_model"] if gradient_steps else [])
    assert not list((tmp_path / "stopped" / "replay").iterdir())
