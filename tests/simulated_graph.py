"""A CUDA graph on a CPU: the operators of one call are recorded with their tensors, and replayed on them.

What a capture bakes in is baked in here too: numbers that lie on the host, and where tensors lie. What a
capture refuses is refused: to read a number, a shape that depends on numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cleanrl.utils import gpu_torch

REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "_pin_memory", "equal"}


class Recorder(TorchDispatchMode):
    """Records the operators that compute something, and tensors from outside as they were before."""

    def __init__(self):
        super().__init__()
        self.operators: list[tuple[Callable, tuple, dict, list[Tensor | None]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.made_here: set[int] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index_put")) and any(
            tensor.dtype == torch.bool for tensor in tensors_of(args[1])
        )
        if name in REFUSED or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        storages = {storage_of(tensor) for tensor in tensors_of((args, kwargs))}
        if operator._schema.is_mutable:
            outside = [t for t in tensors_of((args, kwargs)) if storage_of(t) not in self.made_here]
            self.before += [(tensor, tensor.detach().clone()) for tensor in outside]
        outputs = operator(*args, **kwargs)
        new = [None if storage_of(tensor) in storages else tensor for tensor in tensors_of(outputs)]
        self.made_here |= {storage_of(tensor) for tensor in new if tensor is not None}
        if any(tensor is not None for tensor in new) or operator._schema.is_mutable:
            self.operators.append((operator, args, kwargs, new))
        return outputs


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class SimulatedGraph:
    """In the place of `CudaGraph`."""

    made: list["SimulatedGraph"] = []  # noqa: RUF012, all of a test's

    def __init__(self, call: Callable[[], Any]):
        self.call, self.num_calls, self.num_replays = call, 0, 0
        self.recorder: Recorder | None = None
        SimulatedGraph.made.append(self)

    def __call__(self) -> Any:
        self.num_calls += 1
        if self.num_calls <= gpu_torch.WARM_UP_CALLS:
            return self.call()
        if self.recorder is None:
            recorder = Recorder()
            try:
                with recorder:
                    self.result = self.call()
            except RuntimeError as error:
                raise gpu_torch.CaptureError(str(error)) from error
            finally:
                with torch.no_grad():
                    for tensor, value in reversed(recorder.before):  # a capture computes nothing
                        tensor.copy_(value)
            self.recorder = recorder
        self.num_replays += 1
        with torch.no_grad():
            for operator, args, kwargs, outputs in self.recorder.operators:
                for output, result in zip(outputs, tensors_of(operator(*args, **kwargs)), strict=True):
                    if output is not None:
                        output.copy_(result)
        return self.result
