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


def _capture(value: Any) -> Any:
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return list(value) if isinstance(value, deque) else value


def get_state(env: gym.Env) -> dict[str, Any]:
    """The emulator's state, the random generator's, and every wrapper's attributes that can be saved.

    These are plain data (numbers, strings, None, arrays, and lists, tuples, deques and dicts of these) and
    NumPy random generators. Whatever else a wrapper changes in its life is not part of the state.
    """
    wrappers = []
    while isinstance(env, gym.Wrapper):
        can_be_saved = {
            name: value
            for name, value in vars(env).items()
            if _is_plain(value) or isinstance(value, np.random.Generator)
        }
        wrappers.append({name: _capture(value) for name, value in can_be_saved.items()})
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
            if isinstance(current, np.random.Generator):
                current.bit_generator.state = value
            elif isinstance(current, dict):  # also a Counter or defaultdict
                current.clear()
                current.update(value)
            else:
                setattr(env, name, deque(value, current.maxlen) if isinstance(current, deque) else value)
        env = env.env
    env.ale.restoreState(ale_py.ALEState(state["emulator"]))
    env.np_random.bit_generator.state = state["generator"]
