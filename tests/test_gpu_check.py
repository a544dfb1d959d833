"""The check of a machine with a GPU, as far as it works on a CPU."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
from both_scripts import ROOT, run_python

from cleanrl.utils import gpu_torch


@pytest.mark.slow
def test_on_a_cpu_it_says_what_it_found_part_by_part(tmp_path):
    steps = [f"gradient steps of {name}" for name in ("qdagger_dqn_atari_impalacnn", "dqn_atari_jax")]
    parts = ["machine", *steps, "waits", "frames"]
    options = ["--device", "cpu", "--json", "results.json", "--parts", *parts]
    status, output, errors = run_python(tmp_path, str(ROOT / "tests" / "gpu_check.py"), *options)
    assert status == 0, errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert [json.loads(line) for line in output.splitlines()] == [{name: results[name]} for name in results]
    assert results["machine"]["cores"] >= 1
    assert [result.get("problems", []) for result in results.values()] == [[]] * len(parts)
    for script in ("qdagger_dqn_atari_impalacnn", "dqn_atari"):
        assert results["waits"][script] == {"gradient_steps": 10, "waits_per_step": 1.0}


def fail(device: str) -> dict[str, Any]:
    raise ValueError("this part fails")


def hang(device: str) -> dict[str, Any]:
    import time

    time.sleep(600)
    return {}


PARTS = {"first": (30, fail), "second": (5, hang), "third": (30, lambda device: {"found": device})}


def test_gradient_steps_that_were_not_captured_are_an_error(monkeypatch):
    graph = SimpleNamespace(graph=None)
    script = SimpleNamespace(update=SimpleNamespace(graph=graph))
    with pytest.raises(RuntimeError, match="were not captured"):
        gpu_check.check_captured(script, "cuda")
    graph.graph = "captured"
    gpu_check.check_captured(script, "cuda")
    monkeypatch.setattr(gpu_torch.OneLaunch, "enabled", False)  # after a failed capture
    with pytest.raises(RuntimeError, match="were not captured"):
        gpu_check.check_captured(script, "cuda")


@pytest.mark.parametrize("result", [{"problems": []}, {"problems": ["other bits"]}, {"error": "no result"}])
def test_what_is_wrong_is_in_the_exit_status(monkeypatch, result):
    monkeypatch.setattr(gpu_check, "parts_of", lambda device: {"part": (30, None)})
    monkeypatch.setattr(gpu_check, "run_part", lambda *_: result)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    if result == {"problems": []}:
        gpu_check.main()
    else:
        with pytest.raises(SystemExit) as end:
            gpu_check.main()
        assert end.value.code == 1


@pytest.mark.parametrize("wrong", ["host", "restored", "numbers"])
def test_other_bits_and_numbers_are_problems(monkeypatch, wrong):
    def losses_of(script: str, device: str, num_steps: int, **options: Any) -> list[list[float]]:
        is_wrong = {
            "host": options.get("buffer_device") == "cpu",
            "restored": "restore_at" in options,
            "numbers": device == "cpu",
        }
        return [[1.0 + 0.1 * is_wrong[wrong]]] * num_steps

    monkeypatch.setattr(gpu_check, "losses_of", losses_of)
    problems = gpu_check.check_gradient_steps("dqn_atari", "cuda")["problems"]
    assert len(problems) == 1
    assert wrong in problems[0]


def test_a_part_that_fails_or_hangs_ends_no_other(monkeypatch, tmp_path, capsys):
    this = Path(__file__)
    starter = tmp_path / "gpu_check.py"
    starter.write_text(
        f"import sys; sys.path.insert(0, {str(this.parent)!r})\n"
        "import gpu_check, test_gpu_check\n"
        "gpu_check.parts_of = lambda device: test_gpu_check.PARTS\n"
        "gpu_check.main()\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(starter))
    monkeypatch.setattr(gpu_check, "parts_of", lambda device: PARTS)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--parts", *PARTS])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 1
    results: dict[str, Any] = {}
    for line in capsys.readouterr().out.splitlines():
        results |= json.loads(line)
    assert "this part fails" in results["first"]["error"]
    assert results["second"]["error"] == "not done after 5 s"
    assert results["third"]["found"] == "cpu"
