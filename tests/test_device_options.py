"""How the options choose the device, and how PyTorch computes on it."""

import os

import jax
import pytest
import torch
from both_scripts import JAX, TORCH
from jaxlib import xla_client

from cleanrl.utils import gpu_jax, gpu_torch
from cleanrl.utils.replay.frames_jax import JaxFrames


@pytest.mark.parametrize("value", [False, True])
def test_options_set_how_pytorch_computes(monkeypatch, value):
    monkeypatch.setattr(gpu_torch.OneLaunch, "enabled", not value)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        gpu_torch.choose_device(TORCH.Args(torch_deterministic=value, cuda_graphs=value))
        assert (cudnn.deterministic, cudnn.benchmark) == (value, not value)
        assert gpu_torch.OneLaunch.enabled == value
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def test_without_cuda_no_gpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu_torch.choose_device(TORCH.Args(cuda=False)) == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # PyTorch's optimizers ask every GPU that they see
    monkeypatch.setenv("XLA_FLAGS", "")  # which JAX's adds to
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: updates.append(setting))
    gpu_jax.choose_device(JAX.Args(cuda=False))
    assert ("jax_platforms", "cpu") in updates


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.95"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
    ],
)
def test_jax_may_take_most_of_a_gpu_unless_the_user_says_how_much(monkeypatch, before, after):
    monkeypatch.setattr(os, "environ", dict(before))
    gpu_jax.choose_device(JAX.Args(cuda=False))
    options = xla_client.generate_pjrt_gpu_plugin_options()  # as JAX reads them for a GPU
    assert options["memory_fraction"] == float(next(iter(after.values())))
    assert options["preallocate"] is False
    assert {name: value for name, value in os.environ.items() if "FRACTION" in name} == after


def test_a_buffer_in_host_memory_that_jax_platforms_forbids_is_a_one_line_error(monkeypatch):
    def only_cuda(platform: str) -> None:
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", only_cuda)
    with pytest.raises(
        SystemExit, match=r"^error: JAX_PLATFORMS forbids a replay buffer in host memory; add"
    ):
        JaxFrames.host()


def test_adam_can_be_captured_on_a_gpu():
    assert gpu_torch.adam_options(torch.device("cuda", 0)) == {"fused": True, "capturable": True}
