"""The check of a machine with a GPU, as far as it works on a CPU."""

import json
import sys
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from both_scripts import ROOT, run_python


@pytest.mark.slow
def test_on_a_cpu_it_says_what_it_found_part_by_part(tmp_path):
    options = ["--device", "cpu", "--json", "results.json", "--parts", "machine", "graphs", "waits"]
    status, output, errors = run_python(tmp_path, str(ROOT / "tests" / "gpu_check.py"), *options)
    assert status == 0, errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert [json.loads(line) for line in output.splitlines()] == [{name: results[name]} for name in results]
    assert results["machine"]["cores"] >= 1
    for script in ("qdagger_dqn_atari_impalacnn", "dqn_atari"):
        of_graphs, of_waits = results["graphs"][script], results["waits"][script]
        assert of_graphs["eager_equals_eager"]
        assert of_graphs["graph_equals_eager"]
        assert of_graphs["host_buffer_equals_eager"]
        assert of_waits == {"gradient_steps": 10, "waits_per_step": 1.0}


def fail(device: str) -> dict[str, Any]:
    raise ValueError("this part fails")


def hang(device: str) -> dict[str, Any]:
    import time

    time.sleep(600)
    return {}


PARTS = {"first": (30, fail), "second": (5, hang), "third": (30, lambda device: {"found": device})}


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
    gpu_check.main()
    results: dict[str, Any] = {}
    for line in capsys.readouterr().out.splitlines():
        results |= json.loads(line)
    assert "this part fails" in results["first"]["error"]
    assert results["second"]["error"] == "not done after 5 s"
    assert results["third"]["found"] == "cpu"
