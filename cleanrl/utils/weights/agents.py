"""Recognises what kind of agent a file of weights holds, and fits the weights to a network that can teach.

Each kind but the Impala-CNN has the hidden layers of the DQN network (Mnih et al., 2015); they differ in what
the last layer says of an action. `docs/teachers.md` lists them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cleanrl.utils.bounds import MOST_DENSE_WIDTH, shown
from cleanrl.utils.weights.files import read_weights
from cleanrl.utils.weights.layouts import fit_weights, is_flax, is_student

Weights = dict[str, np.ndarray]
Kind = Literal["DQN", "C51", "QR-DQN", "actor-critic", "Impala-CNN"]

QUANTILES = 200  # for each action, in Stable-Baselines3's QR-DQN
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before each name


def _nature_cnn(prefix: str, last_layer: str) -> dict[str, str]:
    """Our names of the layers of Stable-Baselines3's NatureCNN, and of the layer after it."""
    ours = {"cnn.0": "network.0", "cnn.2": "network.2", "cnn.4": "network.4", "linear.0": "network.7"}
    return {f"{prefix}.{theirs}": name for theirs, name in ours.items()} | {last_layer: "network.9"}


# By a parameter that no other kind has: the kind, our names of its layers, and what it does not act with.
FOREIGN_NAMES: dict[str, tuple[Kind, dict[str, str], tuple[str, ...]]] = {
    "q_net.q_net.0.weight": (
        "DQN",
        _nature_cnn("q_net.features_extractor", "q_net.q_net.0"),
        ("q_net_target.",),
    ),
    "quantile_net.quantile_net.0.weight": (
        "QR-DQN",
        _nature_cnn("quantile_net.features_extractor", "quantile_net.quantile_net.0"),
        ("quantile_net_target.",),
    ),
    "pi_features_extractor.cnn.0.weight": (
        "actor-critic",
        _nature_cnn("pi_features_extractor", "action_net"),
        ("features_extractor.", "vf_features_extractor.", "value_net."),
    ),
    "action_net.weight": (  # before Stable-Baselines3 1.7
        "actor-critic",
        _nature_cnn("features_extractor", "action_net"),
        ("value_net.",),
    ),
    "actor.weight": (
        "actor-critic",
        {f"network.{i}": f"network.{i}" for i in (0, 2, 4, 7)} | {"actor": "network.9"},
        ("critic.",),
    ),
}


@dataclass
class Agent:
    """An agent's weights, under the names of the DQN network or of the Impala-CNN, in either layout."""

    source: str
    kind: Kind
    weights: Weights
    atoms: np.ndarray
    """of C51, else empty: the returns, float32, whose probabilities its outputs (num_actions · atoms) give"""

    @property
    def is_policy(self) -> bool:
        """Whether its outputs are logits of a policy, not Q-values."""
        return self.kind == "actor-critic"

    @property
    def outputs_per_action(self) -> int:
        return len(self.atoms) or 1

    def temperatures(
        self, temperature: float, acts: Literal["auto", "argmax", "sample"]
    ) -> tuple[float, float]:
        """The temperature at which Q-values stand for its policy, and that at which it samples its actions.

        The first is 0 unless its outputs are a policy, the second is 0 if it acts by argmax. With "auto" an
        actor-critic samples, as it did in training.
        """
        samples = acts == "sample" or (acts == "auto" and self.is_policy)
        return (temperature if self.is_policy else 0.0), (temperature if samples else 0.0)

    @property
    def is_flax(self) -> bool:
        return is_flax(self.weights)

    @property
    def dense_width(self) -> int:
        """Units in the dense layer of an Impala-CNN; of a layer that cannot be one, those of the default.

        Its inputs may be others than the script's: those of a copy with wider convolutions, for example.
        """
        match self.weights.get("params/Dense_0/kernel" if self.is_flax else "network.5.weight"):
            case np.ndarray(shape=(inputs, units)):
                width = units if self.is_flax else inputs
                return width if 1 <= width <= MOST_DENSE_WIDTH else 256
        return 256

    def fit(
        self, like: Mapping[str, Any], convert: Callable[[np.ndarray], Any] = np.asarray
    ) -> dict[str, Any]:
        """The weights in the names, layout and order of `like`, converted: see `fit_weights`."""
        fitted = fit_weights(self.weights, like, self.source, self.kind)
        return {name: convert(array) for name, array in fitted.items()}


def read_agent(path: Path, num_actions: int) -> Agent:
    """Reads a file of weights in any format and recognises the kind of agent by its content.

    A QR-DQN's quantiles are averaged: its Q-values are linear in its last hidden layer, as a DQN's are.

    Raises:
        SystemExit: with a one-line error if it cannot be read, or is of a game with other actions.
    """
    kind, weights = _recognise(_unwrapped(read_weights(path)))
    atoms = np.zeros(0, np.float32)
    if kind == "C51":
        atoms = weights.pop("atoms")
        is_finite = (
            atoms.dtype.kind == "f" and atoms.ndim == 1 and len(atoms) > 1 and np.isfinite(atoms).all()
        )
        if not is_finite or (np.diff(atoms) <= 0).any():
            raise SystemExit(
                f"error: {shown(path)} holds weights of C51 whose atoms are not increasing numbers."
            )
    agent = Agent(shown(path), kind, weights, atoms)
    outputs_per_action = QUANTILES if kind == "QR-DQN" else agent.outputs_per_action
    last_layer = "network.7." if is_student(weights) else "network.9."
    bias = weights.get("params/Dense_1/bias" if agent.is_flax else f"{last_layer}bias")
    if bias is not None and bias.ndim == 1 and len(bias) != num_actions * outputs_per_action:
        actions, rest = divmod(len(bias), outputs_per_action)
        has = f"{len(bias)} outputs, not {outputs_per_action} per action" if rest else f"{actions} actions"
        raise SystemExit(
            f"error: {agent.source} holds weights of {kind} with {has}; this game has {num_actions} actions:"
            " use an agent trained on it."
        )
    if kind == "QR-DQN":
        for name in ("network.9.weight", "network.9.bias"):
            array = weights.get(name, atoms)
            if array.dtype.kind == "f" and array.shape[:1] == (QUANTILES * num_actions,):
                quantiles = weights[name].reshape(QUANTILES, num_actions, *weights[name].shape[1:])
                with np.errstate(invalid="ignore"):  # of infinite weights, which `fit` reports
                    weights[name] = quantiles.mean(axis=0, dtype=np.float64).astype(np.float32)
    return agent


def _unwrapped(weights: Weights) -> Weights:
    """Without what wrappers put before every name."""
    for prefix in WRAPPERS * 2:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): array for name, array in weights.items()}
    return weights


def _recognise(weights: Weights) -> tuple[Kind, Weights]:
    """The kind of agent, and what it acts with under our names; other names stay, for `fit` to report."""
    for mark, (kind, layers, ignored) in FOREIGN_NAMES.items():
        if mark not in weights:
            continue
        renamed = {}
        for name, array in weights.items():
            layer, _, parameter = name.rpartition(".")
            if layer in layers:
                renamed[f"{layers[layer]}.{parameter}"] = array
            elif not name.startswith(ignored):
                renamed[name] = array
        return kind, renamed
    if "atoms" in weights:
        return "C51", dict(weights)
    return ("Impala-CNN" if is_student(weights) else "DQN"), dict(weights)
