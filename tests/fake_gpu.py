"""A GPU that does not exist: tensors on it have shapes, types and a device, but no numbers and no memory.

As "cuda" itself this needs a build of PyTorch with CUDA. Transfers to it and reads from it are counted.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("fakegpu")
DEVICE = torch.device("fakegpu:0")
NUMPY = Tensor.numpy


class Watch(TorchDispatchMode):
    """Counts what goes up, what is read back, and what on the host waits for nothing else.

    What is read back is zeros.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        places = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if operator.overloadpacket.__name__ == "_fused_adam_":  # has no fake kernel, and returns nothing
            if set(places) != {"fakegpu"}:
                raise RuntimeError(f"Adam's tensors lie on the devices {sorted(set(places))}")
            self.counts["operators"] += 1
            return None
        output = operator(*args, **(kwargs or {}))
        results = [t.device.type for t in tree_leaves(output) if isinstance(t, Tensor)]
        if "fakegpu" in places and "cpu" in results:
            self.counts["reads"] += 1
            return tree_map_only(Tensor, as_zeros, output)
        if "fakegpu" in results and "cpu" in places:
            self.counts["uploads"] += 1
        elif "fakegpu" in results:
            self.counts["operators"] += 1
        return output


def as_zeros(tensor: Tensor) -> Tensor:
    with fake_tensor.unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """`Tensor.numpy`, which within the mode would give memory that is already somebody else's."""
    with fake_tensor.unset_fake_temporarily():
        return NUMPY(tensor)


def move(module: nn.Module, device: torch.device, memory_format: Any = torch.preserve_format) -> nn.Module:
    """`Module.to` changes a parameter in place, which a fake one does not allow: here is a new one."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            of_format = memory_format if parameter.dim() == 4 else torch.preserve_format
            moved = parameter.detach().to(device, memory_format=of_format)
            part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    return module


@contextmanager
def fake_gpu() -> Iterator[Watch]:
    """Within it, tensors are fake."""
    with (
        mock.patch.object(nn.Module, "to", move),
        mock.patch.object(Tensor, "numpy", to_numpy),
        # So that small constants are no exception.
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0),
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
        Watch() as watch,
    ):
        warnings.simplefilter("ignore")
        yield watch
