"""What two scripts have in common is the same text, so that a test of one is a test of the other."""

import difflib
import inspect
import re
from types import ModuleType

import pytest
from both_scripts import DQN_JAX, DQN_TORCH, JAX, SCRIPTS, TORCH

PAIRS = pytest.mark.parametrize(
    ("in_torch", "in_jax"), [(TORCH, JAX), (DQN_TORCH, DQN_JAX)], ids=["qdagger", "dqn"]
)
# The only lines that may differ in what is compared: those of PyTorch, and those of JAX.
MAY_DIFFER = {
    "- @dataclass",
    "+ @dataclass(unsafe_hash=True)  # JAX compiles for its values",
}
TEACHER_MAY_DIFFER = {'+ teacher_model_exp_name: str = "dqn_atari_jax"'}


def sections(script: ModuleType) -> dict[str, str]:
    """The text of a script's sections by their headings, in order."""
    _, *parts = re.split(r"^# -+ (\w+)$", inspect.getsource(script), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def source(script: ModuleType, name: str) -> str:
    return inspect.getsource(getattr(script, name))


def differences(one: str, other: str) -> set[str]:
    """The lines that only one of two texts has, as `diff` writes them."""
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in (one, other)]
    return {line for line in difflib.ndiff(*lines) if line[0] in "-+"}


@PAIRS
def test_a_script_has_the_same_sections_in_pytorch_and_jax(in_torch, in_jax):
    assert list(sections(in_torch)) == list(sections(in_jax))


@PAIRS
def test_the_algorithm_is_the_same_text_in_pytorch_and_jax(in_torch, in_jax):
    """Options, games, and all of filling, offline, online and main."""
    torch_sections, jax_sections = sections(in_torch), sections(in_jax)
    algorithm = "phases" if in_torch is TORCH else "training"
    found = differences(source(in_torch, "main"), source(in_jax, "main"))
    for heading in ("options", "environment", algorithm):
        of_torch, of_jax = (
            found_sections[heading].partition("\nif __name__")[0]  # the framework's imports come after it
            for found_sections in (torch_sections, jax_sections)
        )
        found |= differences(of_torch, of_jax)
    assert found == (MAY_DIFFER | TEACHER_MAY_DIFFER if in_torch is TORCH else MAY_DIFFER)
    for name in ("epsilon_greedy", "learn_online"):
        assert f"def {name}(" in torch_sections[algorithm]


@PAIRS
def test_schedules_and_constants_are_the_same_in_pytorch_and_jax(in_torch, in_jax):
    schedules = ["linear_schedule"] + (["learning_rate", "online_epsilon"] if in_torch is TORCH else [])
    for name in schedules:
        assert source(in_torch, name) == source(in_jax, name)
    constants = [
        {name: value for name, value in vars(script).items() if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", name)}
        for script in (in_torch, in_jax)
    ]
    assert constants[0] == constants[1]
    assert len(constants[0]) >= 4


def test_every_script_plays_the_same_games_and_explores_them_alike():
    assert len({sections(script)["environment"] for script in SCRIPTS}) == 1
    for name in ("epsilon_greedy", "linear_schedule"):
        assert len({source(script, name) for script in SCRIPTS}) == 1


@pytest.mark.parametrize(("qdagger", "dqn"), [(TORCH, DQN_TORCH), (JAX, DQN_JAX)], ids=["torch", "jax"])
def test_qdaggers_teacher_is_dqns_network(qdagger, dqn):
    assert source(qdagger, "TeacherNetwork").replace("TeacherNetwork", "QNetwork") == source(dqn, "QNetwork")
    shared = ["td_targets", "steps_per_call"]
    if qdagger is JAX:
        shared += ["QFunction"]
    for name in shared:
        assert source(qdagger, name) == source(dqn, name)
