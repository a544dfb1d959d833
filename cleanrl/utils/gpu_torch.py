"""The device PyTorch trains on, and what makes it fast there: one transfer and one launch per call.

On a CPU nothing here changes what is computed.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cleanrl.utils.devices import first_use_of_gpu

WARM_UP_CALLS = 3  # before a capture: libraries and optimizers allocate in them what they keep
ALIGNMENT = 16  # bytes, of each array in a transfer


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on a device, in one non-blocking transfer; on a CPU, without a copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _unpack(_pack(arrays, device).to(device, non_blocking=True), arrays)


def _pack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """The bytes of all arrays, on the host; pinned for a GPU, so that the transfer needs no wait."""
    starts = _starts(arrays)
    packed = np.empty(starts[-1], np.uint8)
    for array, start in zip(arrays, starts, strict=False):
        packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    return torch.from_numpy(packed).pin_memory() if device.type == "cuda" else torch.from_numpy(packed)


def _unpack(packed: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Views of packed bytes, with the arrays' shapes and dtypes."""
    return [
        packed[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, _starts(arrays), strict=False)
    ]


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    return np.cumsum([0, *sizes]).tolist()


class CaptureError(Exception):
    """Why a function cannot be captured."""


@functools.cache
def capture_stream() -> "torch.cuda.Stream":
    """The stream of all captures: libraries keep memory for each stream that they are used on."""
    return torch.cuda.Stream()


class CudaGraph:
    """A call without arguments. After a few calls its kernels are captured, and then launched all at once."""

    def __init__(self, call: Callable[[], Any]):
        self.call, self.num_calls = call, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = capture_stream()

    def __call__(self) -> Any:
        if self.graph is None:
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            if self.num_calls < WARM_UP_CALLS:
                self.num_calls += 1
                with torch.cuda.stream(self.stream):
                    result = self.call()
                current.wait_stream(self.stream)
                return result
            graph = torch.cuda.CUDAGraph()
            try:
                # Where a capture fails, so does its end, which leaves its stream current.
                with torch.cuda.stream(current), torch.cuda.graph(graph, stream=self.stream):
                    self.result = self.call()  # computes nothing
            except RuntimeError as error:
                raise CaptureError(str(error.__context__ or error).partition("\n")[0]) from error
            self.graph = graph
        self.graph.replay()
        return self.result


class OneLaunch:
    """Decorates a function that computes on one device, from NumPy arrays and other arguments.

    The function gets tensors in place of the arrays, which may lie in tuples, on the device of the first
    argument that is a tensor or a module. On a GPU its kernels soon launch together: see `CudaGraph`. For
    that it must do the same at each call, to tensors that stay where they are, and read nothing back. Other
    shapes or another argument that is not an array need a new graph. What a call returns is overwritten by
    the next. If a capture fails, a warning is printed and the run continues without graphs.
    """

    enabled = True  # of all functions: --cuda-graphs

    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function)
        self.function = function
        self.key: list[Any] = []

    def __call__(self, *arguments: Any) -> Any:
        leaves = list(_leaves(arguments))
        arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
        device = _device_of(leaves)
        if not (OneLaunch.enabled and can_capture(device)):
            return self.function(*_replaced(arguments, iter(upload(arrays, device))))
        key = [(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
        if not _is_same(key, self.key):
            self.key = key
            self.inputs = torch.empty(_starts(arrays)[-1], dtype=torch.uint8, device=device)
            tensors = iter(_unpack(self.inputs, arrays))
            self.graph = CudaGraph(functools.partial(self.function, *_replaced(arguments, tensors)))
        self.inputs.copy_(_pack(arrays, device), non_blocking=True)
        try:
            return self.graph()
        except CaptureError as error:
            OneLaunch.enabled = False
            print(f"warning: continuing without CUDA graphs: {error}", file=sys.stderr)
            return self.graph.call()


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def _leaves(value: Any) -> Iterator[Any]:
    """What lies in nested tuples, in order."""
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Nested tuples with the next of the tensors in place of each array."""
    if isinstance(value, tuple):
        items = [_replaced(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return next(tensors) if isinstance(value, np.ndarray) else value


def _device_of(leaves: Sequence[Any]) -> torch.device:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            return leaf.device
        if isinstance(leaf, nn.Module):
            return next(leaf.parameters()).device
    raise TypeError("no argument says on which device to compute")


def _is_same(key: list[Any], other: list[Any]) -> bool:
    """Whether two calls have the same arguments, except for the arrays' contents."""
    if len(key) != len(other):
        return False
    return all(a is b or (isinstance(a, tuple) and a == b) for a, b in zip(key, other, strict=True))


def choose_device(args: Any) -> torch.device:
    """The GPU if there is one and it is wanted, else the CPU; sets how PyTorch computes on it.

    Raises:
        SystemExit: with a one-line error, if there is a GPU that cannot be used.
    """
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic  # times its algorithms before it chooses
    OneLaunch.enabled = args.cuda_graphs
    if not args.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or an optimizer's step takes memory of a GPU that it sees
    if not (args.cuda and torch.cuda.is_available()):
        return torch.device("cpu")
    with first_use_of_gpu():
        device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device)
    return device


def adam_options(device: torch.device) -> dict[str, bool]:
    """Settings of Adam, so that a gradient step can be captured: all that it changes lies on the GPU."""
    return {"fused": True, "capturable": True} if device.type == "cuda" else {}


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets an optimizer's learning rate; where a gradient step can be captured, in a tensor on the GPU."""
    for group in optimizer.param_groups:
        if not (group.get("fused") or group.get("capturable")):
            group["lr"] = value
        elif isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = torch.full((), value, device=group["params"][0].device)
