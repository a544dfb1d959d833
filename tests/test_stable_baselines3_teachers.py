"""Teachers from Stable-Baselines3's zoo, against `stable_baselines3.DQN` itself."""

import io
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np
import pytest
import torch
from hub_server import HubServer, run_python
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

import cleanrl.qdagger_dqn_atari_impalacnn as torch_script
import cleanrl.qdagger_dqn_atari_jax_impalacnn as jax_script
from cleanrl.utils.hub.download import teacher_filename
from cleanrl.utils.weights.files import read_weights


class CountingScreen(gym.Env):
    """Every pixel is the number of steps since the start."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = gym.spaces.Discrete(6)
    steps = 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros((84, 84, 1), np.uint8), {}

    def step(self, action):
        self.steps += 1
        return np.full((84, 84, 1), self.steps, np.uint8), 0.0, False, False, {}


def make_agent() -> DQN:
    envs = VecFrameStack(DummyVecEnv([CountingScreen]), n_stack=4)
    return DQN("CnnPolicy", envs, buffer_size=1, seed=0)


@pytest.fixture(scope="module")
def agent() -> DQN:
    return make_agent()


@pytest.fixture(scope="module")
def saved(agent, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "dqn-PongNoFrameskip-v4.zip"
    agent.save(path)
    return path


def torch_teacher(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    args = torch_script.Args(teacher_model_path=path)
    return partial(torch_script.compute_q_values, torch_script.load_teacher(args, 6, torch.device("cpu")))


def jax_teacher(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    args = jax_script.Args(teacher_model_path=path)
    return partial(jax_script.compute_q_values, jax_script.load_teacher(args, 6, jax.devices("cpu")[0]))


@pytest.mark.parametrize("load", [torch_teacher, jax_teacher])
def test_q_values_equal_those_of_the_agent_that_was_saved(load, agent, saved):
    observations = np.random.default_rng(0).integers(256, size=(8, 4, 84, 84), dtype=np.uint8)
    with torch.no_grad():
        expected = agent.q_net(torch.from_numpy(observations)).numpy()
    assert np.ptp(expected) > 1e-3
    # float32 sums in another order
    np.testing.assert_allclose(load(saved)(observations), expected, rtol=1e-4, atol=1e-6)


def test_it_stacks_frames_in_our_order(agent):
    envs = VecTransposeImage(VecFrameStack(DummyVecEnv([CountingScreen]), n_stack=4))
    observations = envs.reset()
    for _ in range(5):
        observations, _, _, _ = envs.step([0])
    assert observations.shape == (1, 4, 84, 84)
    assert observations[0, :, 0, 0].tolist() == [2, 3, 4, 5]  # as our FrameStack: oldest first


def test_the_online_network_is_read_not_the_target(agent, saved, tmp_path):
    other = make_agent()
    other.q_net.load_state_dict(agent.q_net.state_dict())
    for parameter in other.q_net_target.parameters():
        parameter.data.zero_()
    other.save(tmp_path / "other.zip")
    weights = read_weights(saved)
    for name, array in read_weights(tmp_path / "other.zip").items():
        np.testing.assert_array_equal(array, weights[name])


def test_files_are_named_as_in_the_zoo():
    assert teacher_filename("sb3/dqn-PongNoFrameskip-v4", "dqn_atari") == "dqn-PongNoFrameskip-v4.zip"
    assert teacher_filename("cleanrl/x", "dqn_atari") == "dqn_atari.cleanrl_model"


@pytest.mark.slow
@pytest.mark.parametrize("script", [torch_script, jax_script])
def test_one_from_the_hub_is_loaded(script, saved, tmp_path):
    code = f"from {script.__name__} import *; " + (
        "import sys; args = Args(teacher_policy_hf_repo=sys.argv[1]);"
        "load_teacher(args, 6, choose_device(args))"
    )
    with HubServer(saved.read_bytes()) as server:
        process = run_python(server.url, tmp_path, "-c", code, "sb3/dqn-PongNoFrameskip-v4")
    assert process.status == 0, process.err
    paths = {path for _, path, _ in server.requests}
    assert paths == {"/sb3/dqn-PongNoFrameskip-v4/resolve/main/dqn-PongNoFrameskip-v4.zip"}


def rewrite(saved: Path, path: Path, policy: bytes | None) -> Path:
    """A copy of the zip file with another policy.pth, or none."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if name != "policy.pth":
                new.writestr(name, old.read(name))
        if policy is not None:
            new.writestr("policy.pth", policy)
    return path


class Trap:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "fault", ["no policy", "truncated", "code", "flipped", "not a policy", "another net"]
)
def test_a_bad_zip_file_is_a_one_line_error(fault, saved, tmp_path, capsys):
    path = tmp_path / "bad.zip"
    state_dict = io.BytesIO()
    torch.save({"q_net.q_net.0.weight": torch.zeros(2, 2)}, state_dict)
    if fault == "no policy":
        rewrite(saved, path, None)
    elif fault == "truncated":
        path.write_bytes(saved.read_bytes()[:-1000])
    elif fault == "code":
        rewrite(saved, path, pickle.dumps({"q_net.q_net.0.weight": Trap()}))
    elif fault == "flipped":
        content = bytearray(saved.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "not a policy":
        rewrite(saved, path, b"nothing of the sort")
    else:
        rewrite(saved, path, state_dict.getvalue())
    for load in (torch_teacher, jax_teacher):
        with pytest.raises(SystemExit) as stop:
            load(path)
        assert str(stop.value).startswith(f"error: {path}")
        assert len(str(stop.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")
