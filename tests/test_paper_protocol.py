"""The paper's settings: the command that the docs give for them sets every one.

What each option does: test_learning.py (losses, learning rate, Adam's epsilon, temperature, weight),
test_phases.py (n-step rewards, ε, the end of the distillation), test_losses.py (normalised returns) and
test_environment.py (sticky actions).
"""

import re
import shlex
import sys

from both_scripts import ROOT, TORCH

PAPER = {
    "n_step": 3,
    "temperature": 0.1,
    "distill_weight": 3.0,
    "distill_steps": 1_500_000,
    "offline_steps": 1_000_000,
    "total_timesteps": 2_500_000,
    "learning_starts": 20_000,
    "target_network_frequency": 8000,
    "td_loss": "huber",
    "adam_epsilon": 1.5e-4,
    "learning_rate": 1e-4,
    "final_learning_rate": 1e-5,
    "end_e": 0.01,
    "exploration_steps": 50_000,
    "repeat_action_probability": 0.25,
    "return_normalization": "random",
    "dense_width": 512,
}


def test_the_documented_command_sets_every_row_of_the_papers_settings(monkeypatch):
    page = (
        (ROOT / "docs" / "qdagger.md").read_text("utf-8").replace("\\\n", "")
    )  # commands over several lines
    (options,) = re.findall(r"python cleanrl/qdagger_dqn_atari_impalacnn\.py (.*--preset paper.*)", page)
    monkeypatch.setattr(sys, "argv", [TORCH.__file__, *shlex.split(options)])
    args = vars(TORCH.read_arguments(TORCH.Args, TORCH.PRESETS))
    assert {name: args[name] for name in PAPER} == PAPER
