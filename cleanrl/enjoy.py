"""Plays games with a trained student or teacher, in a window or into videos.

    python cleanrl/enjoy.py --model-path cleanrl/teachers/PongNoFrameskip-v4.safetensors
    python cleanrl/enjoy.py --hf-repo cleanrl/PongNoFrameskip-v4-dqn_atari-seed1 --video-folder videos

A student is played by the framework that trained it, a teacher by PyTorch or, without it, by JAX.
"""

import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np

if not __package__:  # started as a file: the helpers below lie beside it, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cleanrl.utils.bounds import Fraction, NonNegativeInt, PositiveInt
from cleanrl.utils.command_line import check_bounds, parse, refuse
from cleanrl.utils.games.atari import count_actions
from cleanrl.utils.hub.download import Advice, download, teacher_filename
from cleanrl.utils.signals import exit_on_ctrl_c
from cleanrl.utils.weights.files import read_weights
from cleanrl.utils.weights.layouts import fit_weights, flatten, is_flax, is_student, unflatten

ADVICE = Advice("--hf-repo", "--hf-file", "play a local one with --model-path FILE")
GAME = re.compile(r"[A-Za-z0-9]+NoFrameskip-v4")


@dataclass
class Args:
    # agent
    model_path: Path | None = None
    """a student or teacher in a local file (torch, flax, safetensors or Stable-Baselines3's zip)"""
    hf_repo: str | None = None
    """or its repository on the Hub"""
    hf_file: str | None = None
    """its file there (default: {exp_name}.cleanrl_model in a repository {env_id}-{exp_name}-seed{seed})"""

    # game
    env_id: str | None = None
    """the game, as {Game}NoFrameskip-v4 (default: the one in the path or the repository's name)"""
    games: PositiveInt = 3
    """number of games"""
    seed: NonNegativeInt = 1
    """seed of the games and of the random actions"""
    epsilon: Fraction = 0.01
    """probability of a random action"""
    video_folder: Path | None = None
    """write an mp4 of each game to this folder instead of opening a window"""


def find_model(args: Args) -> tuple[Path, str]:
    """The file of weights, downloaded if needed, and the game.

    Raises:
        SystemExit: with a one-line error if there is no such file or its game is unknown.
    """
    if (args.model_path is None) == (args.hf_repo is None):
        raise SystemExit("error: name the model with either --model-path or --hf-repo")
    name = args.hf_repo or args.model_path.as_posix()
    env_id = args.env_id or next(reversed(GAME.findall(name)), None)
    if env_id is None:
        raise SystemExit(f"error: {name} does not name its game; use --env-id, as PongNoFrameskip-v4")
    count_actions(env_id)
    if args.model_path:
        return args.model_path, env_id
    published = re.fullmatch(rf"{re.escape(env_id)}-(.+)-seed\d+", name.rpartition("/")[2])
    if not (args.hf_file or published or name.startswith("sb3/")):
        raise SystemExit(f"error: --hf-repo {name} does not name its file; use --hf-file")
    filename = args.hf_file or teacher_filename(name, published and published[1])
    return download(name, filename, advice=ADVICE), env_id


def load_player(path: Path, env_id: str) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[..., gym.Env]]:
    """Loads a file of weights; returns its function from observations to Q-values, and the `make_env` to use.

    Raises:
        SystemExit: with a one-line error if the file cannot be used for this game or with these packages.
    """
    weights = read_weights(path)
    plays_student = is_student(weights)
    # A student needs its own framework: their max-poolings pad differently. A teacher has none.
    use_jax = is_flax(weights) if plays_student else find_spec("torch") is None
    framework, suffix, packages = ("jax", "_jax", "jax") if use_jax else ("torch", "", "atari")
    if find_spec(framework) is None:
        raise SystemExit(
            f"error: {path} is a student of {framework}, which is not installed;"
            f" pip install -r requirements/requirements-{packages}.txt"
        )
    script = importlib.import_module(f"cleanrl.qdagger_dqn_atari{suffix}_impalacnn")
    if plays_student:
        dense_bias = weights.get("params/Dense_0/bias" if use_jax else "network.5.bias", np.zeros(256))
        network = script.StudentNetwork(count_actions(env_id), len(dense_bias))
    else:
        network = script.TeacherNetwork(count_actions(env_id))
    fit = partial(fit_weights, weights, source=str(path), role="student" if plays_student else "teacher")
    if use_jax:
        import jax

        jax.config.update("jax_platforms", "cpu")
        shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 4, 84, 84), np.uint8))
        q_function = script.QFunction(unflatten(fit(flatten(shapes))), network)
        return partial(script.compute_q_values, q_function), script.make_env
    import torch

    fitted = fit(network.state_dict())
    network.load_state_dict({name: torch.from_numpy(array) for name, array in fitted.items()})
    return partial(script.compute_q_values, network), script.make_env


def open_window(env: gym.Env) -> None:
    """Does what ALE does for render_mode "human", from the next seeded reset on, but without sound.

    Without a sound card, ALE's sound library would flood the terminal with complaints.
    """
    if sys.platform == "linux":  # without a display, SDL would otherwise open an invisible window
        os.environ.setdefault("SDL_VIDEODRIVER", "wayland,x11")
    env.unwrapped.ale.setBool("display_screen", True)


def play(env: gym.Env, q_values: Callable[[np.ndarray], np.ndarray], seed: int, epsilon: float) -> float:
    """Plays one whole game and returns its unclipped return."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    while True:
        action = q_values(observation[None])[0].argmax()
        if rng.random() < epsilon:
            action = rng.integers(env.action_space.n)
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:  # at least a life; the reset reports whether the game was over
            observation, info = env.reset()
            if "episode" in info:
                return info["episode"]["r"]


def main(args: Args) -> None:
    check_bounds(args)
    path, env_id = find_model(args)
    q_values, make_env = load_player(path, env_id)
    if args.video_folder:
        try:
            args.video_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse("video_folder", args.video_folder, f"cannot be created ({error.strerror}); name another")
    returns = []
    for game, seed in enumerate(np.random.SeedSequence(args.seed).generate_state(args.games), start=1):
        with TemporaryDirectory() as scratch:
            env = make_env(env_id, video_folder=Path(scratch) / "video" if args.video_folder else None)
            if args.video_folder is None:
                open_window(env)
            try:
                returns.append(play(env, q_values, int(seed), args.epsilon))
            except RuntimeError as error:
                if "SDL" not in str(error):
                    raise
                raise SystemExit(
                    "error: there is no display for a window; write videos with --video-folder FOLDER"
                ) from None
            env.close()
            for path in Path(scratch).rglob("*.mp4"):
                shutil.move(path, args.video_folder / f"{env_id}-game-{game}.mp4")
        print(f"game {game}: return {returns[-1]:.10g}")
    print(f"mean return {np.mean(returns):.2f} over {args.games} games")


if __name__ == "__main__":
    exit_on_ctrl_c()
    main(parse(Args))
