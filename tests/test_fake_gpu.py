"""Playing and learning on a GPU that does not exist: devices fit, and the host waits once per step."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from both_scripts import DQN_TORCH, NUM_ACTIONS, TORCH, as_teacher, is_qdagger
from fake_gpu import DEVICE, Watch, fake_gpu
from rehearsal import NoRun, RandomGame, rehearsal_args

from cleanrl.utils import gpu_torch

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_ENVS = 8
SHORT = {"teacher_steps": 40, "total_timesteps": 64, "learning_starts": 8, "offline_steps": 9}
SHORT |= {"offline_eval_frequency": 1000, "target_network_frequency": 24}
SCRIPTS = pytest.mark.parametrize("script", [TORCH, DQN_TORCH], ids=["qdagger", "dqn"])


class LateRun(NoRun):
    """Reads nothing that is plotted, and saves nothing."""

    def plot(self, values: dict[str, Any], step: int) -> None:
        pass

    def save_model(self, network: Any, suffix: str = "") -> None:
        pass


@pytest.fixture
def gpu(monkeypatch) -> Watch:
    for script in (TORCH, DQN_TORCH):
        monkeypatch.setattr(script, "adam_options", lambda device: {"fused": True})
        monkeypatch.setattr(script.TorchFrames, "free_memory", lambda device: 80_000_000_000)
    with fake_gpu() as watch:
        yield watch


def new_run(script: Any, buffer_device: str = "cuda") -> tuple[Any, Any, LateRun]:
    """Options, a state with buffers of full size, and a run."""
    full = script.Args(num_envs=NUM_ENVS, buffer_device=buffer_device)
    state = script.create_train_state(full, NUM_ACTIONS, DEVICE)
    args = rehearsal_args(script, NUM_ENVS, buffer_device=buffer_device, **of(script, SHORT))
    return args, state, LateRun(partial(RandomGame, game_length=3))


def of(script: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if hasattr(script.Args, name)}


def counted(watch: Watch, work: Any) -> Counter:
    watch.counts.clear()
    work()
    return watch.counts.copy()


def test_what_is_read_back_is_zeros(gpu):
    """In memory of its own, which what comes later does not write to."""
    numbers = torch.ones(8, 6, device=DEVICE).cpu().numpy()
    others = [np.full((8, 6), 7.5, np.float32) for _ in range(100)]
    assert not numbers.any()
    assert others[0].all()


@pytest.mark.parametrize("buffer_device", ["cuda", "cpu"])
@SCRIPTS
def test_the_host_waits_for_the_gpu_once_per_step_of_all_environments(gpu, script, buffer_device):
    args, state, run = new_run(script, buffer_device)
    if is_qdagger(script):
        teacher = as_teacher(TORCH, TORCH.TeacherNetwork(NUM_ACTIONS)).requires_grad_(False).to(DEVICE)
        state.teacher_return = 20.0
        fill = counted(gpu, lambda: script.fill_teacher_replay(args, state, teacher, run))
        assert fill["reads"] == args.teacher_steps / NUM_ENVS
        offline = counted(gpu, lambda: script.train_offline(args, state, run))
        assert offline["reads"] == 1  # the evaluation at the end is one step long here
        online = counted(gpu, lambda: script.train_online(args, state, teacher, run))
    else:
        online = counted(gpu, lambda: script.train(args, state, run))
    assert online["reads"] == args.total_timesteps / NUM_ENVS
    assert state.gradient_steps > 10
    frames = (state.student_replay if is_qdagger(script) else state.replay).frames.frames
    assert len(frames) > 1_000_000
    assert frames.device.type == {"cuda": DEVICE.type, "cpu": "cpu"}[buffer_device]


@SCRIPTS
def test_a_gradient_step_takes_one_upload_and_acting_takes_one(gpu, script):
    args, state, run = new_run(script)
    work = [] if is_qdagger(script) else [1]
    replay = state.teacher_replay if is_qdagger(script) else state.replay
    replay.start(np.zeros((NUM_ENVS, 4, 84, 84), np.uint8))
    games = run.make_games(NUM_ENVS)
    games.reset(0)
    q_values = [np.zeros((NUM_ENVS, NUM_ACTIONS), np.float32)] if is_qdagger(script) else []
    for _ in range(10):
        games.step_async(np.zeros(NUM_ENVS, int))
        replay.add(np.zeros(NUM_ENVS, int), games.step_wait(), *q_values)
    learn = partial(script.learn, args, state, *(work or [replay, [0.5]]))
    learn()  # Adam makes its moments
    assert counted(gpu, learn)["uploads"] == 1
    assert counted(gpu, learn)["reads"] == 0
    network = state.student if is_qdagger(script) else state.q_network
    acting = counted(gpu, lambda: script.compute_q_values(network, games.observations))
    assert (acting["uploads"], acting["reads"]) == (1, 1)
    assert counted(gpu, lambda: script.update_target_network(state, 0.5))["reads"] == 0


def a_loss_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    update = TORCH.update.function

    def reading_update(*arguments: Any) -> Any:
        losses = update(*arguments)
        losses["loss"].cpu()
        return losses

    monkeypatch.setattr(TORCH.update, "function", reading_update)


def q_values_come_down_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_q_values = TORCH.compute_q_values

    def one_by_one(networks: Any, observations: np.ndarray) -> Any:
        if isinstance(networks, tuple):
            return [compute_q_values(network, observations) for network in networks]
        return compute_q_values(networks, observations)

    monkeypatch.setattr(TORCH, "compute_q_values", one_by_one)


@pytest.mark.parametrize("fault", [a_loss_is_read, q_values_come_down_one_by_one])
def test_every_further_wait_is_seen(gpu, monkeypatch, fault):
    """So that the tests above can fail."""
    fault(monkeypatch)
    args, state, run = new_run(TORCH)
    state.teacher_return = 20.0
    teacher = as_teacher(TORCH, TORCH.TeacherNetwork(NUM_ACTIONS)).requires_grad_(False).to(DEVICE)
    online = counted(gpu, lambda: TORCH.train_online(args, state, teacher, run))
    assert online["reads"] > args.total_timesteps / NUM_ENVS


def test_tensors_that_lie_on_another_device_are_refused(gpu, monkeypatch):
    monkeypatch.setattr(gpu_torch, "upload", lambda arrays, device: [torch.from_numpy(a) for a in arrays])
    args, state, run = new_run(TORCH)
    teacher = as_teacher(TORCH, TORCH.TeacherNetwork(NUM_ACTIONS)).requires_grad_(False).to(DEVICE)
    with pytest.raises(RuntimeError, match="device"):
        TORCH.fill_teacher_replay(replace(args, teacher_steps=8), state, teacher, run)
