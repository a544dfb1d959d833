"""How the options choose the device, and how PyTorch computes on it."""

import jax
import pytest
import torch
from both_scripts import JAX, TORCH

from cleanrl.utils import gpu_jax, gpu_torch


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
    assert gpu_torch.choose_device(TORCH.Args(cuda=False)) == torch.device("cpu")
    monkeypatch.setenv("XLA_FLAGS", "")  # which JAX's adds to
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: updates.append(setting))
    gpu_jax.choose_device(JAX.Args(cuda=False))
    assert updates == [("jax_platforms", "cpu")]


def test_adam_can_be_captured_on_a_gpu():
    assert gpu_torch.adam_options(torch.device("cuda", 0)) == {"fused": True, "capturable": True}
