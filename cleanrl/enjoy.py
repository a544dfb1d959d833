"""Plays games with a trained agent of any kind: in a window, into videos, or many side by side to measure it.

    python cleanrl/enjoy.py cleanrl/teachers/PongNoFrameskip-v4.safetensors
    python cleanrl/enjoy.py cleanrl/PongNoFrameskip-v4-dqn_atari-seed1 --video-folder videos
    python cleanrl/enjoy.py runs/PongNoFrameskip-v4__dqn_atari__1__1700000000 --games 30 --json pong.json
    python cleanrl/enjoy.py random --env-id PongNoFrameskip-v4 --games 30 --json random.json

The agent runs in PyTorch, or in JAX if PyTorch is missing, whichever of them trained it.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro

if not __package__:  # started as a file: makes `cleanrl` importable, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cleanrl.utils.bounds import Bounds, Fraction, Name, NonNegativeInt, PositiveFloat, shown
from cleanrl.utils.command_line import check_bounds, parse, refuse
from cleanrl.utils.evaluation import acting_values, evaluate
from cleanrl.utils.games.atari import check_game
from cleanrl.utils.games.parallel_envs import WorkerError
from cleanrl.utils.hub.download import Advice, download, find_file
from cleanrl.utils.run.folders import saved_model
from cleanrl.utils.shell import prepare_command
from cleanrl.utils.storage import write_durably

ADVICE = Advice("the repository", "--hf-file", "name a file or a run's folder on this machine")
GAME = re.compile(r"[A-Za-z0-9]+NoFrameskip-v4")
RANDOM = "random"  # the agent that is none
REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Args:
    # agent
    agent: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AGENT")]
    """a file of weights of any kind, a run's folder, a repository on the Hub (user/name), or random"""
    hf_file: str | None = None
    """the agent's file in that repository (default: the only one there)"""
    hf_revision: str | None = None
    """branch, tag or commit of that repository"""
    acts: Literal["auto", "argmax", "sample"] = "auto"
    """how the agent acts: argmax of its Q-values, or sample from its policy; auto: an actor-critic samples"""
    temperature: PositiveFloat = 1.0
    """temperature of the policy softmax(Q / temperature) of an agent that has Q-values"""
    script: Name | None = None
    """a copy of a QDagger script in cleanrl/ whose networks and wrappers to use, e.g. my_qdagger"""

    # game
    env_id: str | None = None
    """the game, as {Game}NoFrameskip-v4 (default: the one in the agent's name)"""
    repeat_action_probability: Fraction = 0.0
    """sticky actions: probability that the game repeats the previous action"""
    games: Annotated[int, Bounds(1, 100_000)] = 3
    """number of games"""
    seed: NonNegativeInt = 1
    """seed of the games and of the random actions"""
    epsilon: Fraction = 0.01
    """probability of a random action"""

    # output
    video_folder: Path | None = None
    """write an mp4 of each game to this folder instead of opening a window"""
    json: Path | None = None
    """play the games side by side, without a window, and write their returns to this file"""


def find_agent(args: Args) -> tuple[Path | None, str]:
    """The file of weights, downloaded if needed and None for the random player, and the game.

    Raises:
        SystemExit: with a one-line error if there is no such file or its game is unknown.
    """
    path = Path(args.agent)
    is_repo = REPO.fullmatch(args.agent) and path.parts[0] != "runs"
    if args.agent != RANDOM and not is_repo and not os.path.exists(path):
        raise SystemExit(f"error: {shown(args.agent)} does not exist; check the path")
    env_id = args.env_id or next(reversed(GAME.findall(args.agent)), None)
    if env_id is None:
        fault = f"{shown(args.agent)} does not name its game"
        raise SystemExit(f"error: {fault}; use --env-id, e.g. PongNoFrameskip-v4")
    check_game(env_id)
    if args.agent == RANDOM:
        return None, env_id
    if os.path.isdir(path):  # False also for a name that no file can have
        model = saved_model(path)
        if model is None:
            raise SystemExit(
                f"error: {shown(path)} is not a folder of a run with one saved model; name the file itself"
            )
        return model, env_id
    if os.path.exists(path):
        return path, env_id
    file = args.hf_file or find_file(args.agent, args.hf_revision, advice=ADVICE)
    return download(args.agent, file, args.hf_revision, advice=ADVICE), env_id


class Player(NamedTuple):
    q_values: Callable[[np.ndarray], np.ndarray]
    """from observations uint8 (n, 4, 84, 84) to Q-values (n, actions)"""
    sampling_temperature: float
    """see `acting_values`"""
    make_env: Callable[..., gym.Env]


def load_player(args: Args, path: Path | None, env_id: str) -> Player:
    """Loads a file of weights as a QDagger script loads its teacher; without one, the random player.

    Raises:
        SystemExit: with a one-line error if the file cannot be used for this game or with these packages.
    """
    name = args.script or f"qdagger_dqn_atari{'' if find_spec('torch') else '_jax'}_impalacnn"
    if not Path(__file__).with_name(f"{name}.py").is_file():
        refuse("script", name, "is not in cleanrl/")
    script = importlib.import_module(f"cleanrl.{name}")
    if not hasattr(script, "load_teacher"):
        refuse("script", name, "is not a copy of a QDagger script")
    if hasattr(script, "torch"):
        device = script.torch.device("cpu")
    else:
        script.jax.config.update("jax_platforms", "cpu")
        device = script.jax.devices("cpu")[0]
    make_env = partial(script.make_env, env_id, args.repeat_action_probability)
    num_actions = int(make_env().action_space.n)
    if path is None:
        return Player(lambda observations: np.zeros((len(observations), num_actions)), 1.0, make_env)
    settings = script.Args(teacher_model_path=path, teacher_acts=args.acts, temperature=args.temperature)
    agent = script.load_teacher(settings, num_actions, device)
    return Player(partial(script.compute_q_values, agent), agent.sampling_temperature, make_env)


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


def watch(args: Args, player: Player, env_id: str) -> list[float]:
    """Plays one game after another, each in a window or into a video."""
    returns = []
    for game, seed in enumerate(np.random.SeedSequence(args.seed).generate_state(args.games), start=1):
        with TemporaryDirectory() as scratch:
            env = player.make_env(video_folder=Path(scratch) / "video" if args.video_folder else None)
            if args.video_folder is None:
                open_window(env)
            try:
                returns.append(play(env, player, int(seed), args.epsilon))
            except RuntimeError as error:
                if "SDL" not in str(error):
                    raise
                raise SystemExit(
                    "error: there is no display for a window; use --video-folder FOLDER or --json FILE"
                ) from None
            env.close()
            for path in Path(scratch).rglob("*.mp4"):
                shutil.move(path, args.video_folder / f"{env_id}-game-{game}.mp4")
        print(f"game {game}: return {returns[-1]:.10g}")
    return returns


def measure(args: Args, player: Player, env_id: str, path: Path | None) -> list[float]:
    """Plays the games side by side, as the scripts' evaluations do, and writes what they scored."""
    returns = evaluate(
        player.make_env,
        player.q_values,
        args.games,
        args.seed,
        args.epsilon,
        sampling_temperature=player.sampling_temperature,
    )
    result = {
        "agent": args.agent,
        "sha256": path and hashlib.sha256(path.read_bytes()).hexdigest(),
        "env_id": env_id,
        "repeat_action_probability": args.repeat_action_probability,
        "games": args.games,
        "seed": args.seed,
        "epsilon": args.epsilon,
        "sampling_temperature": player.sampling_temperature,
        "mean": float(np.mean(returns)),
        "std": float(np.std(returns)),
        "median": float(np.median(returns)),
        "returns": returns,
    }
    text = json.dumps(result, indent=1)
    try:
        write_durably(args.json, f"{text}\n".encode())
    except OSError as error:  # such as a full disk
        print(text)  # what took hours is not lost
        refuse("json", args.json, f"cannot be written to ({error.strerror}); its content is above")
    return returns


def check_output(args: Args) -> None:
    """Makes the folder to write to; raises SystemExit with a one-line error if it cannot be written to."""
    name, path = ("json", args.json) if args.json else ("video_folder", args.video_folder)
    try:
        if args.video_folder:
            path.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path).close()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # such as /dev/null, which would be replaced
            refuse(name, path, "is not a file; name another")
        partial = path.with_name(f"{path.name}.partial")  # as `write_durably` calls it meanwhile
        partial.touch()
        partial.unlink()
    except OSError as error:
        refuse(name, path, f"cannot be created ({error.strerror}); name another")


def main(args: Args) -> None:
    check_bounds(args)
    if args.json and args.video_folder:
        raise SystemExit("error: --json and --video-folder cannot be combined")
    path, env_id = find_agent(args)
    player = load_player(args, path, env_id)
    if args.json and path and args.json.exists() and args.json.samefile(path):
        refuse("json", args.json, "is the agent's own file; name another")
    if args.json or args.video_folder:
        check_output(args)
    try:
        returns = measure(args, player, env_id, path) if args.json else watch(args, player, env_id)
    except (WorkerError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    spread = f"std {np.std(returns):.2f}, median {np.median(returns):.10g}"
    least_and_most = f"{min(returns):.10g} to {max(returns):.10g}"
    print(f"mean return {np.mean(returns):.2f} over {args.games} games ({spread}, {least_and_most})")


if __name__ == "__main__":
    prepare_command()
    main(parse(Args))
