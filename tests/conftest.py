import importlib
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

# What the user's shell sets for other programs.
for name in list(os.environ):
    if re.fullmatch(r"(HF|WANDB|TQDM)_.*|.*_proxy|COLUMNS|LINES|PJRT_NPROC|XLA_FLAGS", name, re.IGNORECASE):
        del os.environ[name]

# What is exact, or takes no time, is so on a CPU.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}

# Before any test module imports PyTorch: see `prepare_command`.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# What one JAX process compiled, the next one reads: most of a short run's time. Gone with the session, unless
# the caller has a folder for it.
compiled_programs = tempfile.TemporaryDirectory(prefix="jax_compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled_programs.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# In the background of a shell the tests and what they start ignore Ctrl-C; under `nohup`, a closed terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

QDAGGER = ["qdagger_dqn_atari_impalacnn", "qdagger_dqn_atari_jax_impalacnn"]
DQN = ["dqn_atari", "dqn_atari_jax"]


@pytest.fixture(params=QDAGGER + DQN)
def script(request) -> ModuleType:
    """Each of the four training scripts."""
    return importlib.import_module(f"cleanrl.{request.param}")


@pytest.fixture(params=QDAGGER)
def qdagger(request) -> ModuleType:
    return importlib.import_module(f"cleanrl.{request.param}")


@pytest.fixture(params=DQN)
def dqn(request) -> ModuleType:
    return importlib.import_module(f"cleanrl.{request.param}")


@pytest.fixture(params=[QDAGGER[0], DQN[0]])
def algorithm(request) -> ModuleType:
    """Each algorithm's PyTorch script, for what is the same text in JAX: see test_same_text.py."""
    return importlib.import_module(f"cleanrl.{request.param}")


@pytest.fixture
def train(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Runs a script's `main` with a tiny network, in a folder of its own; returns the run's folder.

    The network is one number, the games take no time, and every evaluated one returns `game_return`. With
    `short_games` a linear network plays real ones, of which those of an evaluation are cut off.
    """
    from both_scripts import use_network  # not before the variables above are set
    from rehearsal import replace_games, shorten_games, tiny_args

    def train_in(
        script: ModuleType,
        name: str = "started",
        short_games: bool = False,
        game_return: float = 1.0,
        **options: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        with pytest.MonkeyPatch.context() as patch:
            use_network(patch, script, "linear" if short_games else "number")
            if short_games:
                shorten_games(patch)
            else:
                replace_games(patch, game_return)
            script.main(tiny_args(script, **options))
        (run_folder,) = (folder / "runs").iterdir()
        return run_folder

    return train_in


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """The JAX scripts set XLA's variables when they start; here, they start many times in one process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that PyTorch's threads only wait for each other."""
    import torch  # not before the variables above are set

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
