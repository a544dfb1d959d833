"""The whole state of an Atari environment, wrappers and all, as plain data."""

from collections import deque
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | deque):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | np.ndarray | np.generic)


def get_state(env: gym.Env) -> dict[str, Any]:
    """The emulator's state, the random generator's, and every wrapper's attributes that are plain data.

    Plain data are numbers, strings, None, arrays, and lists, tuples, deques and dicts of these. Whatever else
    a wrapper changes in its life is not part of the state.
    """
    wrappers = []
    while isinstance(env, gym.Wrapper):
        attributes = {name: value for name, value in vars(env).items() if _is_plain(value)}
        wrappers.append(
            {name: list(value) if isinstance(value, deque) else value for name, value in attributes.items()}
        )
        env = env.env
    return {
        "wrappers": wrappers,
        "emulator": env.ale.cloneState(include_rng=True).serialize(),
        "generator": env.np_random.bit_generator.state,
    }


def set_state(env: gym.Env, state: dict[str, Any]) -> None:
    """Brings an environment made in the same way, and reset once, into a state that `get_state` gave."""
    for attributes in state["wrappers"]:
        for name, value in attributes.items():
            current = getattr(env, name, None)
            setattr(env, name, deque(value, current.maxlen) if isinstance(current, deque) else value)
        env = env.env
    env.ale.restoreState(ale_py.ALEState(state["emulator"]))
    env.np_random.bit_generator.state = state["generator"]
