"""Draws QDagger beside DQN from nothing:  python docs/plot_comparison.py

Reads the event files in docs/results/pong and writes docs/images/pong-comparison.png.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).parent / "results" / "pong"
TEACHER_STEPS, OFFLINE_STEPS = 20_000, 4_000  # of the QDagger runs
WINDOW = 10  # games whose mean is drawn


def games(folder: str) -> np.ndarray:
    """The games that a run finished while it trained: (environment step, return) by row."""
    events = EventAccumulator(str(RESULTS / folder), size_guidance={"scalars": 0})
    events.Reload()
    return np.array([(event.step, event.value) for event in events.Scalars("charts/episodic_return")])


def main() -> None:
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    steps, returns = games("DQN").T
    means = np.convolve(returns, np.ones(WINDOW) / WINDOW, mode="valid")
    (line,) = axes.plot(steps[WINDOW - 1 :], means, label=f"DQN from nothing, mean of {WINDOW} games")
    axes.plot(steps, returns, ".", markersize=2, alpha=0.3, color=line.get_color())
    for framework in ("PyTorch", "JAX"):
        steps, returns = games(framework).T
        axes.plot(
            steps - OFFLINE_STEPS + TEACHER_STEPS, returns, "o-", label=f"QDagger, {framework}, each game"
        )
    axes.axvspan(0, TEACHER_STEPS, alpha=0.1, color="gray", label="QDagger's teacher plays")
    axes.axhline(19.4, linestyle=":", color="gray", label="its teacher, mean of 10 games")
    axes.set(xlabel="environment steps, those of the teacher included", ylabel="return of a game of Pong")
    axes.legend(loc="center right")
    figure.savefig(Path(__file__).parent / "images" / "pong-comparison.png", dpi=110)


if __name__ == "__main__":
    main()
