"""Teachers of every kind, each built and saved by its own library, then loaded by both scripts.

What a teacher must give is compared with what the library's own agent computes from the same observations.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import flax.linen
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from both_scripts import JAX, TORCH, device_of
from flax.serialization import to_bytes
from safetensors.torch import save_file
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage
from torch import nn

from cleanrl.utils.weights.files import read_weights
from cleanrl.utils.weights.layouts import flatten, to_torch

NUM_ACTIONS = 6
TEMPERATURE = 0.25
OBSERVATIONS = np.random.default_rng(0).integers(256, size=(8, 4, 84, 84), dtype=np.uint8)
ATOMS = np.linspace(-10, 10, 51)


class CountingScreen(gym.Env):
    """Every pixel is the number of steps since the start."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = gym.spaces.Discrete(NUM_ACTIONS)
    steps = 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros((84, 84, 1), np.uint8), {}

    def step(self, action):
        self.steps += 1
        return np.full((84, 84, 1), self.steps, np.uint8), 0.0, False, False, {}


class Saved(NamedTuple):
    """An agent in a file, and what its own library says that it computes from OBSERVATIONS."""

    path: Path
    q_values: np.ndarray | None = None
    probabilities: np.ndarray | None = None


def softmax(x: np.ndarray) -> np.ndarray:
    """Of the last axis, in float64."""
    exponentials = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def nature_cnn() -> list[nn.Module]:
    """The layers before the last one, as CleanRL's agents have them in `network`."""
    return [
        nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
    ]  # fmt: skip


class C51(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("atoms", torch.from_numpy(ATOMS).float())
        self.network = nn.Sequential(*nature_cnn(), nn.Linear(512, NUM_ACTIONS * len(ATOMS)))


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*nature_cnn())
        self.actor = nn.Linear(512, NUM_ACTIONS)
        self.critic = nn.Linear(512, 1)


class FlaxNature(flax.linen.Module):
    outputs: int

    @flax.linen.compact
    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 3, 1)) / 255.0
        for features, size, strides in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = flax.linen.relu(flax.linen.Conv(features, (size, size), strides, padding="VALID")(x))
        x = flax.linen.relu(flax.linen.Dense(512)(x.reshape(len(x), -1)))
        return flax.linen.Dense(self.outputs)(x)


def enlarge_last_layer(layer: nn.Linear) -> None:
    """So that actions differ by more than rounding, as a trained agent's do."""
    with torch.no_grad():
        layer.weight.mul_(30)


def stable_baselines3(kind: type, path: Path) -> Saved:
    envs = VecFrameStack(DummyVecEnv([CountingScreen]), n_stack=4)
    agent = kind("CnnPolicy", envs, seed=0, **({"buffer_size": 1} if kind in (DQN, QRDQN) else {}))
    observations = torch.from_numpy(OBSERVATIONS)
    last = {DQN: lambda: agent.q_net.q_net[0], QRDQN: lambda: agent.quantile_net.quantile_net[0]}
    enlarge_last_layer(last.get(kind, lambda: agent.policy.action_net)())
    agent.save(path)
    with torch.no_grad():
        if kind is DQN:
            return Saved(path, agent.q_net(observations).numpy())
        if kind is QRDQN:
            return Saved(path, agent.quantile_net(observations).numpy().mean(axis=1, dtype=np.float64))
        distribution = agent.policy.get_distribution(observations).distribution
        return Saved(path, probabilities=distribution.probs.numpy())


def cleanrl_c51(path: Path) -> Saved:
    torch.manual_seed(0)
    agent = C51()
    enlarge_last_layer(agent.network[9])
    args = {"exp_name": "c51_atari", "n_atoms": 51, "v_min": -10.0, "v_max": 10.0, "hf_entity": None}
    torch.save({"model_weights": agent.state_dict(), "args": args}, path)
    with torch.no_grad():
        logits = agent.network(torch.from_numpy(OBSERVATIONS) / 255.0).numpy()
    return Saved(path, softmax(logits.reshape(-1, NUM_ACTIONS, 51)) @ ATOMS)


def cleanrl_c51_jax(path: Path) -> Saved:
    network = FlaxNature(NUM_ACTIONS * 21)
    params = network.init(jax.random.key(0), OBSERVATIONS)
    params["params"]["Dense_1"]["kernel"] *= 30
    args = {"exp_name": "c51_atari_jax", "n_atoms": 21, "v_min": -5, "v_max": 10.0, "hf_entity": None}
    path.write_bytes(to_bytes({"model_weights": params, "args": args}))
    logits = np.asarray(network.apply(params, OBSERVATIONS))
    return Saved(path, softmax(logits.reshape(-1, NUM_ACTIONS, 21)) @ np.linspace(-5, 10, 21))


def cleanrl_ppo(path: Path) -> Saved:
    torch.manual_seed(0)
    agent = ActorCritic()
    enlarge_last_layer(agent.actor)
    torch.save(agent.state_dict(), path)
    with torch.no_grad():
        logits = agent.actor(agent.network(torch.from_numpy(OBSERVATIONS) / 255.0))
    return Saved(path, probabilities=softmax(logits.numpy()))


def dqn_jax(path: Path) -> Saved:
    network = FlaxNature(NUM_ACTIONS)
    params = network.init(jax.random.key(0), OBSERVATIONS)
    path.write_bytes(to_bytes(params))
    return Saved(path, np.asarray(network.apply(params, OBSERVATIONS)))


def student(path: Path, dense_width: int = 256) -> Saved:
    torch.manual_seed(0)
    network = TORCH.StudentNetwork(NUM_ACTIONS, dense_width)
    torch.save(network.state_dict(), path)
    with torch.no_grad():
        return Saved(path, network(torch.from_numpy(OBSERVATIONS)).numpy())


def student_jax(path: Path, dense_width: int = 256) -> Saved:
    network = JAX.StudentNetwork(NUM_ACTIONS, dense_width)
    params = network.init(jax.random.key(0), OBSERVATIONS)
    path.write_bytes(to_bytes(params))
    return Saved(path, np.asarray(network.apply(params, OBSERVATIONS)))


KINDS: dict[str, Callable[[Path], Saved]] = {
    "DQN of Stable-Baselines3": lambda path: stable_baselines3(DQN, path),
    "QR-DQN of its contrib": lambda path: stable_baselines3(QRDQN, path),
    "PPO of Stable-Baselines3": lambda path: stable_baselines3(PPO, path),
    "A2C of Stable-Baselines3": lambda path: stable_baselines3(A2C, path),
    "C51": cleanrl_c51,
    "C51 in JAX": cleanrl_c51_jax,
    "PPO": cleanrl_ppo,
    "DQN in JAX": dqn_jax,
    "student": student,
    "student in JAX": student_jax,
    "wide student": lambda path: student(path, 512),
    "narrow student in JAX": lambda path: student_jax(path, 40),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
SCRIPTS = pytest.mark.parametrize("script", [TORCH, JAX], ids=["torch", "jax"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Saved]:
    folder = tmp_path_factory.mktemp("agents")
    made: dict[str, Saved] = {}

    def make(kind: str) -> Saved:
        if kind not in made:
            made[kind] = KINDS[kind](folder / f"{len(made)}.zip")
        return made[kind]

    return make


def load(script: ModuleType, path: Path, num_actions: int = NUM_ACTIONS, **options: str):
    args = script.Args(teacher_model_path=path, temperature=TEMPERATURE, **options)
    return script.load_teacher(args, num_actions, device_of(script))


def check(script: ModuleType, path: Path, agent: Saved) -> None:
    """Float32 sums in another order, and no more, may differ."""
    q_values = script.compute_q_values(load(script, path), OBSERVATIONS)
    assert q_values.dtype == np.float32
    if agent.q_values is not None:
        assert np.ptp(agent.q_values, axis=1).min() > 1e-3
        np.testing.assert_allclose(q_values, agent.q_values, rtol=1e-4, atol=1e-5)
    else:
        assert np.ptp(agent.probabilities, axis=1).min() > 1e-2
        np.testing.assert_allclose(softmax(q_values / TEMPERATURE), agent.probabilities, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(q_values, TEMPERATURE * np.log(agent.probabilities), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ values


@EVERY_KIND
@SCRIPTS
def test_a_teacher_gives_what_its_own_library_computes(kind, script, saved):
    check(script, saved(kind).path, saved(kind))


def policy_of(path: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(path) as archive:
        return torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Stable" in kind or "contrib" in kind])
def test_a_bare_policy_and_a_zip_of_a_folder_are_the_same_agent(kind, saved, tmp_path):
    agent = saved(kind)
    torch.save(policy_of(agent.path), tmp_path / "policy.pth")
    check(TORCH, tmp_path / "policy.pth", agent)
    with zipfile.ZipFile(agent.path) as old, zipfile.ZipFile(tmp_path / "folder.zip", "w") as new:
        for name in old.namelist():
            new.writestr(f"my-agent/{name}", old.read(name))
    check(TORCH, tmp_path / "folder.zip", agent)


@EVERY_KIND
def test_safetensors_of_every_kind(kind, saved, tmp_path):
    agent, path = saved(kind), tmp_path / "agent.safetensors"
    if "Stable" in kind or "contrib" in kind:
        tensors = policy_of(agent.path)
    else:
        tensors = {name: torch.from_numpy(array) for name, array in read_weights(agent.path).items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    check(TORCH, path, agent)
    check(JAX, path, agent)


def test_an_actor_critic_from_before_pi_features_extractor(saved, tmp_path):
    agent = saved("PPO of Stable-Baselines3")
    old = {
        name: tensor for name, tensor in policy_of(agent.path).items()
        if not name.startswith(("pi_features_extractor.", "vf_features_extractor."))
    }  # fmt: skip
    torch.save(old, tmp_path / "policy.pth")
    check(TORCH, tmp_path / "policy.pth", agent)


def test_an_actor_critic_with_two_trunks_acts_with_the_actors(saved, tmp_path):
    agent = saved("PPO of Stable-Baselines3")
    policy = policy_of(agent.path)
    for name in policy:
        if name.startswith(("features_extractor.", "vf_features_extractor.")):
            policy[name] = torch.zeros_like(policy[name])
    torch.save(policy, tmp_path / "policy.pth")
    check(TORCH, tmp_path / "policy.pth", agent)


@pytest.mark.parametrize("kind", ["DQN of Stable-Baselines3", "QR-DQN of its contrib"])
def test_the_online_network_is_read_not_the_target(kind, saved, tmp_path):
    agent = saved(kind)
    policy = policy_of(agent.path)
    for name in policy:
        if "_target." in name:
            policy[name] = torch.zeros_like(policy[name])
    torch.save(policy, tmp_path / "policy.pth")
    check(TORCH, tmp_path / "policy.pth", agent)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", ["C51", "PPO", "student"])
def test_names_of_wrapped_modules(kind, prefix, saved, tmp_path):
    agent = saved(kind)
    wrapped = {f"{prefix}{name}": torch.from_numpy(array) for name, array in read_weights(agent.path).items()}
    torch.save(wrapped, tmp_path / "wrapped")
    check(TORCH, tmp_path / "wrapped", agent)


def test_stable_baselines3_stacks_frames_in_our_order():
    envs = VecTransposeImage(VecFrameStack(DummyVecEnv([CountingScreen]), n_stack=4))
    observations = envs.reset()
    for _ in range(5):
        observations, _, _, _ = envs.step([0])
    assert observations.shape == (1, 4, 84, 84)
    assert observations[0, :, 0, 0].tolist() == [2, 3, 4, 5]  # as our FrameStack: oldest first


def test_a_jax_student_is_another_function_with_pytorchs_pooling(saved):
    """So that the check above notices it."""
    agent = saved("student in JAX")
    network = TORCH.StudentNetwork(NUM_ACTIONS)
    weights = to_torch(read_weights(agent.path))
    network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    assert not np.allclose(TORCH.compute_q_values(network, OBSERVATIONS), agent.q_values, rtol=1e-2)


# ------------------------------------------------------------------------------------------------ acting


@SCRIPTS
@pytest.mark.parametrize(
    ("kind", "acts", "samples"),
    [
        ("PPO", "auto", True),
        ("PPO", "argmax", False),
        ("C51", "auto", False),
        ("C51", "sample", True),
        ("A2C of Stable-Baselines3", "auto", True),
        ("student", "auto", False),
    ],
)
def test_who_samples_its_actions(kind, acts, samples, script, saved):
    teacher = load(script, saved(kind).path, teacher_acts=acts)
    assert teacher.sampling_temperature == (TEMPERATURE if samples else 0.0)


# ------------------------------------------------------------------------------------------- bad content


def refusal(script: ModuleType, path: Path, num_actions: int = NUM_ACTIONS) -> str:
    with pytest.raises(SystemExit) as stop:
        load(script, path, num_actions)
    message = stop.value.code
    assert len(message.splitlines()) == 1
    assert message.startswith(f"error: {path}")
    return message.removeprefix(f"error: {path}")


RECOGNISED = {
    "DQN": ("DQN of Stable-Baselines3", "DQN in JAX"),
    "QR-DQN": ("QR-DQN of its contrib",),
    "actor-critic": ("PPO of Stable-Baselines3", "A2C of Stable-Baselines3", "PPO"),
    "C51": ("C51", "C51 in JAX"),
    "Impala-CNN": ("student", "student in JAX"),
}
NAMES = [(name, kind) for name, kinds in RECOGNISED.items() for kind in kinds]


@SCRIPTS
@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_an_agent_of_another_game(name, kind, script, saved):
    for num_actions in (4, 3):
        line = refusal(script, saved(kind).path, num_actions)
        assert line == (
            f" holds weights of {name} with 6 actions; this game has {num_actions} actions:"
            " use an agent trained on it."
        )


@SCRIPTS
@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_the_line_of_bad_weights_names_what_was_recognised(name, kind, script, saved, tmp_path):
    if "Stable" in kind or "contrib" in kind:
        tensors = policy_of(saved(kind).path)
    else:
        tensors = {name: torch.from_numpy(array) for name, array in read_weights(saved(kind).path).items()}
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    path = tmp_path / "bad.safetensors"

    def line(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path)
        return refusal(script, path)

    ignored = (
        "features_extractor.",
        "vf_",
        "value_net",
        "critic",
        "q_net_target",
        "quantile_net_target",
        "atoms",
    )
    used = [name for name in tensors if not name.startswith(ignored)]
    used = [*used[:2], used[len(used) // 2], *used[-2:]]
    for value in (torch.nan, torch.inf):
        for one in used:
            bad = tensors | {one: torch.full_like(tensors[one], value)}
            assert f" holds weights of {name}, but " in line(bad)
    for one in used[1:]:  # by the first one the kind is recognised
        without = {other: tensor for other, tensor in tensors.items() if other != one}
        assert "architecture differs (missing " in line(without)
        narrower = tensors | {one: tensors[one][..., :-1].contiguous()}
        assert f"holds weights of {name} with " in line(narrower) or "architecture differs" in line(narrower)
    assert f" was taken for weights of {name}, but" in line(tensors | {"extra.bias": torch.zeros(3)})


@pytest.mark.parametrize("last", [torch.tensor(1.0), torch.zeros(1200, dtype=torch.int8)])
def test_quantiles_of_another_shape_or_type_are_refused(last, saved, tmp_path):
    tensors = policy_of(saved("QR-DQN of its contrib").path)
    name = max(name for name in tensors if name.startswith("quantile_net.") and name.endswith(".bias"))
    torch.save(tensors | {name: last}, tmp_path / "bad")
    assert "weights of QR-DQN, but the architecture differs (network.9.bias is" in refusal(
        TORCH, tmp_path / "bad"
    )


@pytest.mark.parametrize(
    "atoms",
    [
        np.arange(51),
        np.linspace(-10, 10, 51) + 0j,
        np.zeros(51),
        np.linspace(10, -10, 51),
        np.full(51, np.nan),
        np.zeros((51, 1)),
        np.zeros(0),
        np.ones(1),
    ],
)
def test_atoms_that_are_none(atoms, saved, tmp_path):
    weights = {name: torch.from_numpy(array) for name, array in read_weights(saved("C51").path).items()}
    torch.save(weights | {"atoms": torch.from_numpy(atoms)}, tmp_path / "bad")
    assert refusal(TORCH, tmp_path / "bad") == " holds weights of C51 whose atoms are not increasing numbers."


@pytest.mark.parametrize(
    "args",
    [
        None,
        {},
        {"v_min": -10, "v_max": 10},
        {"v_min": -10, "v_max": 10, "n_atoms": 10**12},
        {"v_min": -10, "v_max": 10, "n_atoms": 0},
        {"v_min": float("-inf"), "v_max": 10, "n_atoms": 21},
        {"v_min": "-10", "v_max": 10, "n_atoms": 21},
    ],
)
def test_c51_without_usable_arguments(args, tmp_path):
    """It is then a DQN with too many outputs."""
    params = FlaxNature(NUM_ACTIONS * 21).init(jax.random.key(0), OBSERVATIONS)
    path = tmp_path / "bad"
    path.write_bytes(to_bytes({"model_weights": params, "args": args}))
    assert " holds weights of DQN with 126 actions; this game has 6 actions" in refusal(JAX, path)


def rewrite(old_path: Path, path: Path, policy: bytes | None) -> Path:
    """A copy of the zip file with another policy.pth, or none."""
    with zipfile.ZipFile(old_path) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if name != "policy.pth":
                new.writestr(name, old.read(name))
        if policy is not None:
            new.writestr("policy.pth", policy)
    return path


class Trap:
    def __reduce__(self):
        return print, ("run",)


@SCRIPTS
@pytest.mark.parametrize(
    "fault", ["no policy", "truncated", "code", "flipped", "not a policy", "another net"]
)
def test_a_bad_zip_file_is_a_one_line_error(fault, script, saved, tmp_path, capsys):
    path, good = tmp_path / "bad.zip", saved("DQN of Stable-Baselines3").path
    state_dict = io.BytesIO()
    torch.save({"q_net.q_net.0.weight": torch.zeros(2, 2)}, state_dict)
    if fault == "no policy":
        rewrite(good, path, None)
    elif fault == "truncated":
        path.write_bytes(good.read_bytes()[:-1000])
    elif fault == "code":
        rewrite(good, path, pickle.dumps({"q_net.q_net.0.weight": Trap()}))
    elif fault == "flipped":
        content = bytearray(good.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "not a policy":
        rewrite(good, path, b"nothing of the sort")
    else:
        rewrite(good, path, state_dict.getvalue())
    refusal(script, path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("format", ["torch", "flax"])
def test_code_beside_the_weights_is_not_run(format, saved, tmp_path, capsys):
    path = tmp_path / "trap"
    weights = {name: torch.from_numpy(array) for name, array in read_weights(saved("C51").path).items()}
    if format == "torch":
        torch.save({"model_weights": weights, "args": {"exp_name": Trap()}}, path)
        assert "could run code" in refusal(TORCH, path)
    else:
        params = FlaxNature(6).init(jax.random.key(0), OBSERVATIONS)
        path.write_bytes(to_bytes({"model_weights": params, "args": pickle.dumps(Trap())}))
        load(JAX, path)  # the arguments are bytes, and nothing is asked of them
    assert capsys.readouterr() == ("", "")


def test_our_names_are_flattened_flax():
    """The test's flax network has the names that this file is about."""
    params = FlaxNature(6).init(jax.random.key(0), OBSERVATIONS)
    layers = ("Conv_0", "Conv_1", "Conv_2", "Dense_0", "Dense_1")
    assert set(flatten(params)) == {
        f"params/{layer}/{part}" for layer in layers for part in ("kernel", "bias")
    }
