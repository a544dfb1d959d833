"""Plays games with a trained agent of any kind, in a window or into videos.

    python cleanrl/enjoy.py --model-path cleanrl/teachers/PongNoFrameskip-v4.safetensors
    python cleanrl/enjoy.py --hf-repo cleanrl/PongNoFrameskip-v4-dqn_atari-seed1 --video-folder videos

PyTorch plays it or, without PyTorch, JAX, whichever of them it was trained with.
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
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np

if not __package__:  # started as a file: the helpers below lie beside it, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cleanrl.utils.bounds import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from cleanrl.utils.command_line import check_bounds, parse, refuse
from cleanrl.utils.evaluation import acting_values
from cleanrl.utils.games.atari import count_actions
from cleanrl.utils.hub.download import Advice, download, find_file
from cleanrl.utils.signals import exit_on_ctrl_c

ADVICE = Advice("--hf-repo", "--hf-file", "play a local one with --model-path FILE")
GAME = re.compile(r"[A-Za-z0-9]+NoFrameskip-v4")


@dataclass
class Args:
    # agent
    model_path: Path | None = None
    """an agent in a local file (torch, flax, safetensors or Stable-Baselines3's zip)"""
    hf_repo: str | None = None
    """or its repository on the Hub"""
    hf_file: str | None = None
    """its file there (default: the only agent there)"""
    acts: Literal["auto", "argmax", "sample"] = "auto"
    """by the argmax of its Q-values or by sampling from its policy; auto: an actor-critic samples"""
    temperature: PositiveFloat = 1.0
    """temperature of the policy softmax(Q / temperature) of an agent that has Q-values"""

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
    return download(name, args.hf_file or find_file(name, advice=ADVICE), advice=ADVICE), env_id


class Player(NamedTuple):
    q_values: Callable[[np.ndarray], np.ndarray]
    """from observations uint8 (n, 4, 84, 84) to Q-values (n, actions)"""
    sampling_temperature: float
    """see `acting_values`"""
    make_env: Callable[..., gym.Env]


def load_player(args: Args, path: Path, env_id: str) -> Player:
    """Loads a file of weights as a QDagger script loads its teacher.

    Raises:
        SystemExit: with a one-line error if the file cannot be used for this game or with these packages.
    """
    use_torch = find_spec("torch") is not None
    script = importlib.import_module(f"cleanrl.qdagger_dqn_atari{'' if use_torch else '_jax'}_impalacnn")
    if use_torch:
        import torch

        device = torch.device("cpu")
    else:
        import jax

        jax.config.update("jax_platforms", "cpu")
        device = jax.devices("cpu")[0]
    settings = script.Args(teacher_model_path=path, teacher_acts=args.acts, temperature=args.temperature)
    agent = script.load_teacher(settings, count_actions(env_id), device)
    return Player(partial(script.compute_q_values, agent), agent.sampling_temperature, script.make_env)


def open_window(env: gym.Env) -> None:
    """Does what ALE does for render_mode "human", from the next seeded reset on, but without sound.

    Without a sound card, ALE's sound library would flood the terminal with complaints.
    """
    if sys.platform == "linux":  # without a display, SDL would otherwise open an invisible window
        os.environ.setdefault("SDL_VIDEODRIVER", "wayland,x11")
    env.unwrapped.ale.setBool("display_screen", True)


def play(env: gym.Env, player: Player, seed: int, epsilon: float) -> float:
    """Plays one whole game and returns its unclipped return."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    while True:
        values = acting_values(rng, player.q_values(observation[None]), player.sampling_temperature)
        action = values[0].argmax()
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
    player = load_player(args, path, env_id)
    if args.video_folder:
        try:
            args.video_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse("video_folder", args.video_folder, f"cannot be created ({error.strerror}); name another")
    returns = []
    for game, seed in enumerate(np.random.SeedSequence(args.seed).generate_state(args.games), start=1):
        with TemporaryDirectory() as scratch:
            env = player.make_env(env_id, video_folder=Path(scratch) / "video" if args.video_folder else None)
            if args.video_folder is None:
                open_window(env)
            try:
                returns.append(play(env, player, int(seed), args.epsilon))
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
