"""Replays that the DQN scripts save and the QDagger scripts load: what comes back, and what is refused."""

import dataclasses
import errno
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zstandard
from large_replay import LargeReplay
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleanrl import dqn_atari, dqn_atari_jax, qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn
from cleanrl.utils.games.parallel_envs import StepResult
from cleanrl.utils.replay import rows as replay_files
from cleanrl.utils.replay.rows import check_new_folder, open_replay, save_replay
from cleanrl.utils.storage import read_manifest, read_tree, write_manifest, write_tree

PONG = "PongNoFrameskip-v4"
PONG_TEACHER = Path(__file__).resolve().parents[1] / "cleanrl" / "teachers" / f"{PONG}.safetensors"
NUM_ACTIONS, NUM_ENVS, CAPACITY_PER_ENV = 6, 3, 20
GAMMA = 0.9
ROWS_PER_FILE = 17
# With the 24 slots that such a buffer has, spare ones included: no ring is full, some are, all are.
SHORT, MIDDLE, LONG = 12, 20, 45
# Q-values that depend on every frame of a stack: those of a teacher that costs no time.
TEACHER = np.random.default_rng(1).normal(size=(4 * 7 * 7, NUM_ACTIONS)).astype(np.float32)
Rows = dict[str, np.ndarray]


def pixels(observations: Any) -> Any:
    return observations[:, :, ::12, ::12].reshape(len(observations), 4 * 7 * 7) / 255.0


class TorchTeacher(torch.nn.Module):
    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return pixels(observations) @ torch.from_numpy(TEACHER)


class JaxTeacher(flax.linen.Module):
    def __call__(self, observations: jax.Array) -> jax.Array:
        return pixels(observations) @ TEACHER


class TorchScalar(torch.nn.Module):
    """A student that is one number."""

    def __init__(self, num_actions: int, dense_width: int):
        super().__init__()
        self.num_actions = num_actions
        self.number = torch.nn.Parameter(torch.ones(1))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.number + torch.zeros(len(observations), self.num_actions)


class JaxScalar(flax.linen.Module):
    num_actions: int
    dense_width: int

    @flax.linen.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        number = self.param("number", lambda key: jnp.ones(1))
        return jnp.broadcast_to(number, (len(observations), self.num_actions))


class TorchScripts:
    dqn: ModuleType = dqn_atari
    qdagger: ModuleType = qdagger_dqn_atari_impalacnn
    Scalar = TorchScalar

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def create_dqn_replay(self, capacity: int, num_envs: int) -> Any:
        return self.dqn.ReplayBuffer(capacity, num_envs, self.device)

    def create_qdagger_replay(self, *settings: Any) -> Any:
        return self.qdagger.ReplayBuffer(*settings, self.device)

    def start(self, replay: Any, observations: np.ndarray) -> Any:
        replay.start(observations)
        return replay

    def add(self, replay: Any, actions: np.ndarray, step: StepResult) -> Any:
        replay.add(actions, step)
        return replay

    def cheap_teacher(self) -> Any:
        return TorchTeacher()

    def q_values(self, teacher: Any, observations: np.ndarray) -> np.ndarray:
        return self.qdagger.compute_q_values(teacher, self.device, observations)

    def draw(self, replay: Any, batch_size: int) -> np.ndarray:
        return replay.draw(batch_size, np.random.default_rng(0))

    def gather(self, replay: Any, slots: np.ndarray) -> Rows:
        batch = replay.gather(torch.from_numpy(slots))
        return {name: values.numpy() for name, values in batch._asdict().items()}


jax_draw = jax.jit(lambda replay, key, batch_size: replay.draw(key, batch_size), static_argnames="batch_size")
jax_gather = jax.jit(lambda replay, slots: replay.gather(slots))


class JaxScripts:
    dqn: ModuleType = dqn_atari_jax
    qdagger: ModuleType = qdagger_dqn_atari_jax_impalacnn
    Scalar = JaxScalar

    @property
    def device(self) -> jax.Device:
        return jax.devices("cpu")[0]

    def create_dqn_replay(self, capacity: int, num_envs: int) -> Any:
        return self.dqn.ReplayBuffer.create(capacity, num_envs, self.device)

    def create_qdagger_replay(self, *settings: Any) -> Any:
        return self.qdagger.ReplayBuffer.create(*settings, self.device)

    def start(self, replay: Any, observations: np.ndarray) -> Any:
        return replay.start(observations)

    def add(self, replay: Any, actions: np.ndarray, step: StepResult) -> Any:
        return replay.add(actions, step)

    def cheap_teacher(self) -> Any:
        return self.qdagger.QFunction({}, JaxTeacher())

    def q_values(self, teacher: Any, observations: np.ndarray) -> np.ndarray:
        return self.qdagger.compute_q_values(teacher, observations)

    def draw(self, replay: Any, batch_size: int) -> np.ndarray:
        return np.asarray(jax_draw(replay, jax.random.key(0), batch_size))

    def gather(self, replay: Any, slots: np.ndarray) -> Rows:
        batch = jax_gather(replay, np.resize(slots, len(replay.frames)))  # compiled for one number of slots
        return {name: np.asarray(values)[: len(slots)] for name, values in batch._asdict().items()}


pytestmark = pytest.mark.usefixtures("one_thread")

TORCH, JAX = TorchScripts(), JaxScripts()
Scripts = TorchScripts | JaxScripts


@pytest.fixture(params=[TORCH, JAX], ids=["torch", "jax"])
def scripts(request) -> Scripts:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def many_files():
    rows_between = partial(replay_files.rows_between, rows_per_file=ROWS_PER_FILE)
    with mock.patch.object(replay_files, "rows_between", rows_between):
        yield


# ----------------------------------------------------------------------------------------- what comes back


class Transition(NamedTuple):
    observation: np.ndarray
    action: int
    reward: float
    next_observation: np.ndarray
    terminated: bool
    ended: bool
    depth: int  # how far the episode reaches back, at most 3


class Stream:
    """Random steps of several environments, and all of them kept the simple way.

    `logs[env]` holds what takes up room in a buffer, by position: a transition, or None for an observation
    that ended an episode. A frame's first pixels are its environment and its position.
    """

    def __init__(self, num_steps: int):
        rng = np.random.default_rng(0)

        def frame(env: int, position: int) -> np.ndarray:
            pixels = rng.integers(256, size=(84, 84), dtype=np.uint8)
            pixels[0, :2] = env, position
            return pixels

        self.logs: list[list[Transition | None]] = [[] for _ in range(NUM_ENVS)]
        stacks = [np.stack([frame(env, 0)] * 4) for env in range(NUM_ENVS)]
        depths = [0] * NUM_ENVS
        self.first_observations = np.stack(stacks)
        self.steps: list[tuple[np.ndarray, StepResult]] = []
        for _ in range(num_steps):
            actions = rng.integers(NUM_ACTIONS, size=NUM_ENVS)
            rewards = rng.normal(size=NUM_ENVS).astype(np.float32)
            terminations, truncations = rng.random((2, NUM_ENVS)) < [0.02, 0.1, 0.2]  # so that heads differ
            final_stacks = []
            for env, log in enumerate(self.logs):
                next_stack = np.stack([*stacks[env][1:], frame(env, len(log) + 1)])
                ended = bool(terminations[env] or truncations[env])
                taken = stacks[env], actions[env], rewards[env]
                log.append(Transition(*taken, next_stack, terminations[env], ended, depths[env]))
                final_stacks.append(next_stack)
                stacks[env], depths[env] = next_stack, min(depths[env] + 1, 3)
                if ended:
                    log.append(None)
                    stacks[env], depths[env] = np.stack([frame(env, len(log))] * 4), 0
            result = StepResult(
                np.stack(stacks), rewards, terminations, truncations, np.stack(final_stacks), []
            )
            self.steps.append((actions, result))

    def oldest(self, env: int) -> int:
        """The first position whose row is saved."""
        return max(len(self.logs[env]) + 1 - (CAPACITY_PER_ENV + 4), 0)

    def drawable(self, capacity_per_env: int, n_step: int) -> set[tuple[int, int]]:
        """(env, position) of the transitions that are kept, their stacks and their n rewards whole."""
        keys = set()
        for env, log in enumerate(self.logs):
            known = range(max(len(log) - (n_step - 1), 0))
            for position in known[-capacity_per_env:]:
                transition = log[position]
                if transition and position - transition.depth >= self.oldest(env):
                    keys.add((env, position))
        return keys

    def n_step(self, env: int, position: int, n: int) -> tuple[float, Transition, int]:
        """The sum of rewards, the transition that is its last, and the number of rewards."""
        total = 0.0
        for k in range(n):
            transition = self.logs[env][position + k]
            total += GAMMA**k * transition.reward
            if transition.ended:
                break
        return total, transition, k + 1


def fill(scripts: Scripts, stream: Stream) -> Any:
    replay = scripts.create_dqn_replay(CAPACITY_PER_ENV * NUM_ENVS, NUM_ENVS)
    replay = scripts.start(replay, stream.first_observations)
    for actions, result in stream.steps:
        replay = scripts.add(replay, actions, result)
    return replay


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[Scripts, int], tuple[Path, Stream]]:
    """A folder that a DQN script's buffer was saved to after so many steps, and what these were."""
    streams, folders = {}, {}

    def save(scripts: Scripts, num_steps: int) -> tuple[Path, Stream]:
        if num_steps not in streams:
            streams[num_steps] = Stream(num_steps)
        if (scripts, num_steps) not in folders:
            folder = tmp_path_factory.mktemp("replay")
            save_replay(folder, fill(scripts, streams[num_steps]), PONG, NUM_ACTIONS)
            folders[scripts, num_steps] = folder
        return folders[scripts, num_steps], streams[num_steps]

    return save


def load(
    scripts: Scripts, folder: Path, teacher: Any = None, buffer_size: int = 10**6, n_step: int = 1
) -> Any:
    """The QDagger script's buffer, as large as the script itself would make it."""
    replay = open_replay(folder, PONG, NUM_ACTIONS, least_rows=1)
    capacity = min(buffer_size, replay.capacity)
    buffer = scripts.create_qdagger_replay(capacity, replay.num_envs, NUM_ACTIONS, n_step, GAMMA)
    state = SimpleNamespace(replay=buffer, device=scripts.device)
    scripts.qdagger.load_teacher_buffer(state, teacher or scripts.cheap_teacher(), replay)
    return state.replay


def draw_everything(scripts: Scripts, replay: Any) -> Rows:
    """Every transition that can be drawn, once."""
    slots = scripts.draw(replay, 40 * replay.num_slots * len(replay.heads))  # misses one: e^-40
    return scripts.gather(replay, np.unique(slots))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(TORCH, TORCH), (TORCH, JAX), (JAX, TORCH)],
    ids=["torch", "torch-jax", "jax-torch"],
)
@pytest.mark.parametrize(
    ("num_steps", "buffer_per_env", "n_step"),
    [
        (SHORT, 10**6, 1),
        (MIDDLE, 10**6, 1),
        (LONG, 10**6, 1),
        (LONG, CAPACITY_PER_ENV, 1),
        (LONG, 9, 1),
        (LONG, 10**6, 3),
        (LONG, 9, 3),
    ],
)
def test_what_is_loaded_is_what_was_saved(saved, writer, reader, num_steps, buffer_per_env, n_step):
    folder, stream = saved(writer, num_steps)
    assert len(list(folder.glob("rows-*.zst"))) > 2
    batch = draw_everything(reader, load(reader, folder, None, buffer_per_env * NUM_ENVS, n_step))
    keys = [(int(env), int(position)) for env, position in batch["observations"][:, -1, 0, :2]]
    assert len(set(keys)) == len(keys)
    assert set(keys) == stream.drawable(buffer_per_env, n_step)
    for row, (env, position) in enumerate(keys):
        transition = stream.logs[env][position]
        total, last, steps = stream.n_step(env, position, n_step)
        np.testing.assert_array_equal(batch["observations"][row], transition.observation)
        np.testing.assert_array_equal(batch["next_observations"][row], last.next_observation)
        assert batch["actions"][row] == transition.action
        assert batch["rewards"][row] == pytest.approx(total, rel=1e-5)
        assert batch["terminations"][row] == last.terminated
        assert batch["discounts"][row] == pytest.approx(GAMMA**steps)
    np.testing.assert_allclose(
        batch["teacher_q_values"], pixels(batch["observations"]) @ TEACHER, rtol=1e-4, atol=1e-4
    )


def test_the_streams_fill_none_some_and_all_of_the_rings():
    full = {
        steps: [Stream(steps).oldest(env) > 0 for env in range(NUM_ENVS)] for steps in (SHORT, MIDDLE, LONG)
    }
    assert not any(full[SHORT])
    assert any(full[MIDDLE])
    assert not all(full[MIDDLE])
    assert all(full[LONG])
    logs = Stream(LONG).logs
    assert len({len(log) for log in logs}) == NUM_ENVS
    assert any(t.terminated for log in logs for t in log if t)
    assert any(t.ended and not t.terminated for log in logs for t in log if t)


@pytest.mark.parametrize("num_steps", [SHORT, LONG])
def test_both_scripts_write_the_same_bytes(saved, num_steps):
    torch_files, jax_files = (
        {path.name: path.read_bytes() for path in saved(writer, num_steps)[0].iterdir()}
        for writer in (TORCH, JAX)
    )
    assert torch_files == jax_files


def test_a_replay_says_how_much_it_holds(saved):
    folder, stream = saved(TORCH, MIDDLE)
    replay = open_replay(folder, PONG, NUM_ACTIONS, least_rows=1)
    lengths = [len(log) + 1 - stream.oldest(env) for env, log in enumerate(stream.logs)]
    assert replay.num_envs == NUM_ENVS
    assert replay.num_rows == sum(lengths)
    assert replay.capacity == NUM_ENVS * max(lengths)


def test_nothing_is_unpickled(saved, monkeypatch):
    folder, _ = saved(TORCH, SHORT)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, mock.Mock(side_effect=AssertionError("unpickled")))
    load(TORCH, folder)


# ------------------------------------------------------------------------------------- real games, real runs


@pytest.fixture(scope="module")
def pong(tmp_path_factory) -> Path:
    """A replay of two games of Pong, played at random."""
    rng, num_envs = np.random.default_rng(0), 2
    envs = [dqn_atari.make_env(PONG) for _ in range(num_envs)]
    replay = dqn_atari.ReplayBuffer(1000, num_envs, torch.device("cpu"))
    replay.start(np.stack([env.reset(seed=seed)[0] for seed, env in enumerate(envs)]))
    no = np.zeros(num_envs, bool)
    for _ in range(150):
        actions = rng.integers(NUM_ACTIONS, size=num_envs)
        observations, rewards, *_ = zip(*map(lambda env, a: env.step(a), envs, actions), strict=True)
        observations = np.stack(observations)
        replay.add(actions, StepResult(observations, np.float32(rewards), no, no, observations, []))
    folder = tmp_path_factory.mktemp("pong")
    save_replay(folder, replay, PONG, NUM_ACTIONS)
    return folder


def test_real_frames_take_less_than_a_tenth_of_their_size_on_disk(pong):
    num_rows = open_replay(pong, PONG, NUM_ACTIONS, least_rows=300).num_rows
    assert num_rows == 2 * 151
    assert sum(path.stat().st_size for path in pong.iterdir()) < num_rows * 84 * 84 / 10


def test_the_teacher_in_the_buffer_is_the_real_one(scripts, pong):
    args = scripts.qdagger.Args(teacher_model_path=PONG_TEACHER)
    teacher = scripts.qdagger.load_teacher(args, NUM_ACTIONS, scripts.device)
    batch = draw_everything(scripts, load(scripts, pong, teacher, buffer_size=40))
    assert len(batch["actions"]) == 40
    expected = scripts.q_values(teacher, batch["observations"])
    np.testing.assert_allclose(batch["teacher_q_values"], expected, rtol=1e-4, atol=1e-4)
    assert batch["teacher_q_values"].std(axis=0).min() > 0


QDAGGER = {
    "env_id": PONG,
    "teacher_model_path": PONG_TEACHER,
    "return_normalization": "random",  # a cut-off game of Pong ends below 0, for the teacher as well
    "num_envs": 3,
    "learning_starts": 8,
    "total_timesteps": 24,
    "buffer_size": 100,
    "batch_size": 8,
    "teacher_steps": 10**9,
    "offline_steps": 4,
    "teacher_eval_episodes": 1,
    "eval_episodes": 1,
}


def test_qdagger_trains_offline_on_the_replay_and_the_teacher_does_not_play(
    scripts, pong, tmp_path, monkeypatch
):
    module = scripts.qdagger
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "evaluate", partial(module.evaluate, max_game_frames=200))
    monkeypatch.setattr(module, "StudentNetwork", scripts.Scalar)
    monkeypatch.setattr(module, "fill_teacher_buffer", mock.Mock(side_effect=AssertionError("it played")))
    train_offline, buffers = module.train_offline, []

    def spying_train_offline(args, state, *others):
        buffers.append(draw_everything(scripts, state.replay))
        return train_offline(args, state, *others)

    monkeypatch.setattr(module, "train_offline", spying_train_offline)
    module.main(module.Args(**QDAGGER, teacher_replay_path=pong))
    assert len(buffers[0]["actions"]) == 100
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    events.Reload()
    for tag in ("charts/offline/loss", "charts/offline/q_loss", "charts/offline/distill_loss", "losses/loss"):
        assert all(np.isfinite(event.value) for event in events.Scalars(tag))
        assert events.Scalars(tag)


@pytest.mark.parametrize("create", [JAX.create_dqn_replay, JAX.create_qdagger_replay])
def test_jax_compiles_a_few_programs_for_parts_of_any_length(create):
    settings = (NUM_ACTIONS, 1, GAMMA) if create == JAX.create_qdagger_replay else ()
    replay = create(CAPACITY_PER_ENV * NUM_ENVS, NUM_ENVS, *settings)
    rng = np.random.default_rng(0)
    num_read, num_written = replay._read._cache_size(), replay._write._cache_size()
    everything = np.arange(len(replay.frames))
    expected = {name: values.copy() for name, values in replay.read(everything).items()}
    for length in range(18):
        slots = rng.permutation(everything)[:length]
        for values in expected.values():
            values[slots] = rng.integers(2 if values.dtype == bool else 200, size=values[slots].shape)
        replay = replay.write(slots, {name: values[slots] for name, values in expected.items()})
        for held, indices in ((replay.read(slots), slots), (replay.read(everything), everything)):
            assert held.keys() == expected.keys()
            for name, values in held.items():
                np.testing.assert_array_equal(values, expected[name][indices])
    # For 1, 2, 4, 8, 16 and 32 rows, and for all to be read.
    assert replay._read._cache_size() <= num_read + 7
    assert replay._write._cache_size() <= num_written + 6


# ------------------------------------------------------------------------------------------ what is refused


def read_all(folder: Path, env_id: str = PONG, num_actions: int = NUM_ACTIONS, least_rows: int = 1) -> None:
    for _ in open_replay(folder, env_id, num_actions, least_rows).rows(num_slots=100):
        pass


def refusal(folder: Path, *arguments: Any) -> str:
    """The one line with which a replay is refused; it names the folder and, after a semicolon, what to do."""
    with pytest.raises(SystemExit) as end:
        read_all(folder, *arguments)
    line = end.value.code
    assert line.startswith("error: ")
    assert str(folder) in line
    assert "\n" not in line
    assert "; " in line
    return line


@pytest.fixture
def replay(saved, tmp_path) -> Path:
    """A saved replay that may be damaged."""
    return shutil.copytree(saved(TORCH, SHORT)[0], tmp_path / "replay")


def rows_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.zst"))


def alter_manifest(folder: Path, **changes: Any) -> None:
    """Writes a manifest that differs, with the right checksum."""
    manifest = folder / "manifest.json"
    write_manifest(manifest, read_manifest(manifest) | changes)


def replace_file(folder: Path, index: int, data: bytes) -> None:
    """Writes a rows file that is something else, with the right checksum in the manifest."""
    path, files = rows_files(folder)[index], read_manifest(folder / "manifest.json")["files"]
    path.write_bytes(data)
    files[index] = [path.name, hashlib.sha256(data).hexdigest()]
    alter_manifest(folder, files=files)


def alter_rows(folder: Path, index: int, alter: Callable[[Rows], Any]) -> None:
    """Writes a rows file that differs, with the right checksum in the manifest."""
    files = read_manifest(folder / "manifest.json")["files"]
    rows = read_tree(folder, replay_files.FileEntry(*files[index]))
    altered = alter(rows)
    files[index] = list(write_tree(folder / files[index][0], rows if altered is None else altered))
    alter_manifest(folder, files=files)


def test_a_replay_that_is_whole_is_not_refused(replay):
    read_all(replay)
    alter_manifest(replay)
    alter_rows(replay, 1, lambda rows: None)
    read_all(replay)


def test_a_half_written_replay(replay):
    (replay / "manifest.json").unlink()
    assert "has no manifest.json: it was not saved to the end" in refusal(replay)


def test_a_folder_that_is_not_there_or_not_a_folder(tmp_path):
    assert "is not a folder; name one that --save-replay wrote" in refusal(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    assert "is not a folder; name one that --save-replay wrote" in refusal(file)
    assert "has no manifest.json" in refusal(tmp_path)


def test_a_disk_that_is_full_leaves_a_folder_without_a_manifest(tmp_path):
    class FullDisk(LargeReplay):
        def read(self, slots: np.ndarray) -> Rows:
            if slots[0] > 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().read(slots)

    with pytest.raises(SystemExit) as end:
        save_replay(tmp_path, FullDisk(3 * ROWS_PER_FILE), PONG, NUM_ACTIONS)
    assert end.value.code.startswith(f"error: --save-replay {tmp_path}: No space left on device; make room")
    assert len(rows_files(tmp_path)) == 1
    assert "has no manifest.json" in refusal(tmp_path)
    check_new_folder(tmp_path)  # the run that goes on after that may save it again
    save_replay(tmp_path, LargeReplay(ROWS_PER_FILE), PONG, NUM_ACTIONS)
    read_all(tmp_path)
    with pytest.raises(SystemExit, match="is not empty; name a new folder"):
        check_new_folder(tmp_path)


def test_a_missing_rows_file(replay):
    path = rows_files(replay)[1]
    path.unlink()
    assert f"{path.name} cannot be read (No such file or directory)" in refusal(replay)


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_a_damaged_rows_file(replay, index, damage):
    path = rows_files(replay)[index]
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"cut": data[:-1], "emptied": b"", "flipped": flipped}[damage])
    assert f"{path.name} is damaged: its checksum is not the manifest's" in refusal(replay)


@pytest.mark.parametrize("change", [(b'"version": 1', b'"version": 2'), (b"oldest", b"OLDEST"), (b"\n", b"")])
def test_an_altered_manifest(replay, change):
    manifest = replay / "manifest.json"
    assert change[0] in manifest.read_bytes()
    manifest.write_bytes(manifest.read_bytes().replace(*change, 1))
    assert "manifest.json is" in refusal(replay)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}", b"\xff\xfe\n{}", b"[" * 10**5, bytes(1000), pickle.dumps({"a": 1})]
)
def test_a_manifest_that_is_something_else(replay, content):
    (replay / "manifest.json").write_bytes(content)
    assert "manifest.json is" in refusal(replay)


@pytest.mark.parametrize("content", [[], [1], 5, None, [["format", "other"]], {}, {"format": "other"}])
def test_a_foreign_manifest_with_a_right_checksum(replay, content):
    text = json.dumps(content).encode()
    (replay / "manifest.json").write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    assert "manifest.json is not" in refusal(replay)


def test_a_checkpoints_manifest_is_none_of_a_replay(replay):
    write_manifest(replay / "manifest.json", {"version": 1, "script": "dqn_atari", "files": []})
    assert "manifest.json is not that of a replay" in refusal(replay)


def test_another_game_another_number_of_actions_another_version(replay):
    game = refusal(replay, "BreakoutNoFrameskip-v4", 4)
    assert f"it is a replay of {PONG} with 6 actions, not of BreakoutNoFrameskip-v4 with 4" in game
    assert "with 6 actions, not of PongNoFrameskip-v4 with 18" in refusal(replay, PONG, 18)
    alter_manifest(replay, version=2)
    assert "manifest.json has version 2, not 1" in refusal(replay)


def test_too_few_frames(replay, saved):
    num_rows = open_replay(replay, PONG, NUM_ACTIONS, 1).num_rows
    read_all(replay, least_rows=num_rows)
    line = refusal(replay, PONG, NUM_ACTIONS, num_rows + 1)
    assert f"holds {num_rows} frames and" in line
    assert f"but {num_rows + 1} and 1 are needed; save a longer replay" in line


def test_too_few_steps_of_an_environment_for_the_rewards_to_be_summed(replay):
    saved = open_replay(replay, PONG, NUM_ACTIONS, least_rows=1)
    fewest_steps = int((saved.heads - saved.oldest).min())
    open_replay(replay, PONG, NUM_ACTIONS, 1, fewest_steps)
    with pytest.raises(SystemExit, match=f"but 1 and {fewest_steps + 1} are needed; save a longer replay"):
        open_replay(replay, PONG, NUM_ACTIONS, 1, fewest_steps + 1)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../replay/rows-000000.zst", "a/b.zst", ".", "..", "", 5, "\0"]
)
def test_a_manifest_cannot_name_files_elsewhere(replay, name, monkeypatch):
    files = read_manifest(replay / "manifest.json")["files"]
    alter_manifest(replay, files=[[name, files[0][1]], *files[1:]])
    refusal(replay)


@pytest.mark.parametrize(
    "changes",
    [
        {"oldest": [0, 0]},
        {"oldest": []},
        {"oldest": [], "heads": []},
        {"oldest": [-1, 0, 0]},
        {"oldest": [10**6] * 3},
        {"heads": [5]},
        {"heads": 5},
        {"heads": [[15], [15], [15]]},
        {"heads": ["many", 0, 0]},
        {"heads": [10**30] * 3},
        {"heads": None},
        {"files": None},
        {"files": [["rows-000000.zst"]]},
        {"files": "rows"},
        {"files": {"rows-000000.zst": 1}},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense(replay, changes):
    alter_manifest(replay, **changes)
    refusal(replay)


@pytest.mark.parametrize("name", ["oldest", "heads", "files", "env_id", "num_actions"])
def test_a_manifest_that_lacks_something(replay, name):
    manifest = replay / "manifest.json"
    content = read_manifest(manifest)
    del content[name]
    write_manifest(manifest, content)
    assert "manifest.json is not that of a replay" in refusal(replay)


def set_item(name: str, index: int, value: Any) -> Callable[[Rows], None]:
    def alter(rows: Rows) -> None:
        rows[name] = rows[name].copy()
        rows[name][index] = value

    return alter


ALTERED_ROWS = {
    "an environment below 0": set_item("envs", 0, -1),
    "an environment too many": set_item("envs", 3, NUM_ENVS),
    "a position before the oldest": set_item("positions", 0, -1),
    "a position after the newest": set_item("positions", 3, 1000),
    "an action that the game does not have": set_item("actions", -1, NUM_ACTIONS),
    "a stack that reaches too far": set_item("stack_depths", 2, 4),
    "a frame missing": lambda rows: rows | {"frames": rows["frames"][:-1]},
    "smaller frames": lambda rows: rows | {"frames": rows["frames"][:, :80]},
    "frames of another type": lambda rows: rows | {"frames": rows["frames"].astype(np.int16)},
    "rewards of another type": lambda rows: rows | {"rewards": rows["rewards"].astype(np.float64)},
    "rewards in a list": lambda rows: rows | {"rewards": rows["rewards"].tolist()},
    "something else beside it": lambda rows: rows | {"another": rows["rewards"]},
    "no rewards": lambda rows: {name: values for name, values in rows.items() if name != "rewards"},
    "a list": lambda rows: list(rows.values()),
    "nothing": lambda rows: {},
}


@pytest.mark.parametrize("alter", ALTERED_ROWS.values(), ids=ALTERED_ROWS)
def test_rows_that_are_not_those_of_a_replay(replay, alter):
    alter_rows(replay, 1, alter)
    line = refusal(replay)
    assert "rows-000001.zst does not hold the rows of a replay buffer of this game; save or copy" in line


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(100),
        zstandard.compress(b""),
        zstandard.compress(bytes(100)),
        pickle.dumps(Bomb()),
        zstandard.compress(pickle.dumps(Bomb())),
    ],
)
def test_a_rows_file_of_something_else_with_a_right_checksum(replay, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    replace_file(replay, 0, data)
    assert "rows-000000.zst is not what it should be; save or copy the replay again" in refusal(replay)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("kept", [slice(0), slice(1, None), slice(-1)])
def test_a_manifest_that_does_not_name_all_rows(replay, kept):
    """Without any, drawing from the buffer would not end."""
    alter_manifest(replay, files=read_manifest(replay / "manifest.json")["files"][kept])
    refusal(replay)


# ----------------------------------------------------------------------------------- refused before the work


@pytest.fixture
def no_run(monkeypatch, tmp_path):
    """A folder to start in, in which no run may be started."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for module in (TORCH.dqn, JAX.dqn, TORCH.qdagger, JAX.qdagger):
        monkeypatch.setattr(
            module, "training_run", mock.Mock(side_effect=AssertionError("a run was started"))
        )
    return folder


def test_a_bad_replay_is_refused_before_the_teacher_plays(scripts, replay, no_run):
    (replay / "manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"has no manifest\.json"):
        scripts.qdagger.main(scripts.qdagger.Args(**QDAGGER, teacher_replay_path=replay))
    args = scripts.qdagger.Args(**QDAGGER, teacher_replay_path=no_run / "nowhere")
    with pytest.raises(SystemExit, match=r"--teacher-replay-path .*nowhere is not a folder"):
        scripts.qdagger.main(args)
    assert not list(no_run.iterdir())


def test_a_replay_shorter_than_a_batch_is_refused_before_the_teacher_plays(scripts, replay, no_run):
    options = QDAGGER | {"batch_size": 99, "teacher_replay_path": replay}
    with pytest.raises(SystemExit, match="but 99 and 1 are needed; save a longer replay"):
        scripts.qdagger.main(scripts.qdagger.Args(**options))


def test_a_folder_that_is_no_new_one_is_refused_before_the_training(scripts, no_run):
    full = no_run / "full"
    full.mkdir()
    (full / "file").touch()
    for folder, fault in [
        (full, "is not empty; name a new folder"),
        (full / "file", "name another folder"),
        (full / "file" / "below", "name another folder"),
    ]:
        with pytest.raises(SystemExit) as end:
            scripts.dqn.main(scripts.dqn.Args(env_id=PONG, buffer_size=100, save_replay=folder))
        assert end.value.code.startswith(f"error: --save-replay {folder}")
        assert end.value.code.endswith(fault)
        assert "\n" not in end.value.code
    assert list(full.iterdir()) == [full / "file"]


def test_a_new_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    folder = tmp_path / "some" / "new" / "folder"
    for _ in range(2):
        check_new_folder(folder)
        assert list(folder.iterdir()) == []


def test_an_option_for_the_replay_is_in_every_script():
    for scripts in (TORCH, JAX):
        (save,) = (f for f in dataclasses.fields(scripts.dqn.Args) if f.name == "save_replay")
        (path,) = (f for f in dataclasses.fields(scripts.qdagger.Args) if f.name == "teacher_replay_path")
        assert save.default is path.default is None
