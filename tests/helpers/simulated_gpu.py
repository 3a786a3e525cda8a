"""A simulated GPU: tensors that report the device cuda:0, compute on the CPU, and watch for what a GPU would not like.

Operators with tensors on both devices fail. Host synchronisations are recorded, or fail with the operator and the line
of our code that called it. Values are those of the CPU, so that results on both devices can be compared.
"""

import contextlib
import functools
import linecache
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from tests.helpers import backward_walk
from tests.helpers.configs import ROOT

GPU = torch.device("cuda", 0)
# Operators that make the host wait for a value of the device, or for the size of their result.
WAITS = {
    "_local_scalar_dense": ".item(), bool(), int() or float() of a tensor",
    "bincount": "bincount",
    "equal": "torch.equal",
    "masked_select": "masked_select",
    "nonzero": "nonzero, or torch.where with one argument",
    "repeat_interleave": "repeat_interleave without output_size",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique_consecutive",
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class HostSyncError(AssertionError):
    """A host synchronisation where none is allowed."""


class WrongDeviceError(AssertionError):
    """An operator with tensors on two devices."""


class GpuTensor(Tensor):
    """A tensor on the simulated GPU; `value` is on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "GpuTensor":
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        made: GpuTensor = Tensor._make_wrapper_subclass(cls, value.shape, **layout, device=GPU)  # type: ignore
        made.value = value
        return made

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.value})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the simulated GPU after its end")


class SimulatedEvent:
    """A mark in the stream of the simulated GPU, which has done all of its work."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "SimulatedEvent") -> float:
        return 1000 * (end.time - self.time)

    def synchronize(self) -> None:
        pass


class SimulatedGenerator(torch.Generator):
    """A generator of the CPU, whatever the device asked for."""

    def __new__(cls, device: object = None) -> "SimulatedGenerator":
        return super().__new__(cls, torch.device("cpu"))

    def __init__(self, device: object = None) -> None:
        pass


class SimulatedGpu(TorchDispatchMode):
    """Runs operators on the CPU and watches their devices.

    Attributes:
        syncs: host synchronisations so far, `<place>: <operator>`.
        forbidden: raise `HostSyncError` at the next one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.forbidden = False
        self._pinned = WeakIdKeyDictionary()

    @contextlib.contextmanager
    def no_syncs(self) -> Iterator[None]:
        """Fail at a host synchronisation inside."""
        before, self.forbidden = self.forbidden, True
        try:
            yield
        finally:
            self.forbidden = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if name in ("_pin_memory", "is_pinned"):
            return self._pinning(name, args[0])
        target = kwargs.get("device")
        on_gpu = any(isinstance(tensor, GpuTensor) for tensor in tensors)
        if name in ("_to_copy", "copy_"):
            target = self._check_copy(name, args, kwargs)
        elif on_gpu:
            self._check(name, args, tensors)
        if target is not None:
            on_gpu = torch.device(target).type == GPU.type
            kwargs |= {"device": torch.device("cpu")} if "device" in kwargs else {}
        plain = tree_map_only(GpuTensor, lambda tensor: tensor.value, (args, kwargs))
        with torch._C._DisableTorchDispatch():
            result = func(*plain[0], **plain[1])
        if not on_gpu or name == "_local_scalar_dense":
            return args[0] if name == "copy_" else result
        result = tree_map_only(Tensor, GpuTensor, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if _aliases(func) else result

    def _pinning(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return tensor in self._pinned
        with torch._C._DisableTorchDispatch():
            pinned = tensor.clone()
        self._pinned[pinned] = True
        return pinned

    def _check_copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> torch.device:
        """The device of a copy, which must not make the host wait."""
        if name == "copy_":
            target, source, blocking = args[0].device, args[1], not kwargs.get("non_blocking", (*args, False)[2])
        else:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            blocking = not kwargs.get("non_blocking")
        if source.device.type != target.type:
            if target.type == "cpu":
                self._sync(f"{name} to the CPU")
            elif blocking or source not in self._pinned:
                self._sync(f"{name} to the GPU, {'blocking' if blocking else 'from memory that is not pinned'}")
        return target

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        indices = [index for index in args[1] if index is not None] if name in INDEXING else []
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self._sync(f"{name} with a boolean index")
        if any(not isinstance(index, GpuTensor) for index in indices):
            self._sync(f"{name} with an index on the CPU")
        if name in WAITS and not (name == "repeat_interleave" and tensors[0] is not args[0]):
            self._sync(f"{name} ({WAITS[name]})")
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor) and tensor.ndim]
        if on_cpu and not indices:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in on_cpu)
            raise WrongDeviceError(f"{our_line()}: aten.{name} takes tensors of the GPU and of the CPU, {shapes}")

    def _sync(self, what: str) -> None:
        self.syncs.append(f"{our_line()}: aten.{what}")
        if self.forbidden:
            raise HostSyncError(f"{self.syncs[-1]} is a host synchronisation")


@functools.cache
def _aliases(operator: Any) -> bool:
    """True if a result of the operator is a view of an argument, or an argument itself."""
    return any(argument.alias_info is not None for argument in operator._schema.arguments)


def our_line() -> str:
    """The innermost line of our code on the stack, with its function and text."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and "/site-packages/" not in path and "/tests/helpers/" not in path:
            line = linecache.getline(path, frame.f_lineno).strip()
            return f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno} in {frame.f_code.co_name} ({line})"
        frame = frame.f_back
    return "unknown line"


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Run the body with a GPU that this machine does not need to have."""
    gpu = SimulatedGpu()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_: True,
            "torch.accelerator.is_available": lambda *_: True,
            "torch.accelerator.current_accelerator": lambda *_, **__: GPU,
            "torch.cuda.get_rng_state": lambda *_: torch.get_rng_state(),
            "torch.cuda.set_rng_state": lambda state, *_: torch.set_rng_state(state),
            "torch.cuda.get_device_name": lambda *_: "simulated GPU",
            "torch.cuda.max_memory_allocated": lambda *_: 0,
            "torch.cuda.Event": SimulatedEvent,
            "torch.Generator": SimulatedGenerator,
            "torch._C._current_graph_task_id": lambda: backward_walk.passes,  # else checkpoints recompute per tensor
            "torch.autograd.backward": _backward,
            "torch.Tensor.backward": lambda tensor: _backward([tensor], [torch.ones_like(tensor)]),
        }.items():
            patch.setattr(name, value)
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        stack.enter_context(FakeTensorMode())  # without it, torch would initialise CUDA
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the choice of a kernel asks for the GPU's properties
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(gpu)
        yield gpu


_ENGINE = torch.autograd.backward


def _backward(tensors: Any, gradients: Any) -> None:
    if any(isinstance(tensor, GpuTensor) for tensor in tensors):
        backward_walk.backward(tensors, gradients)
    else:
        _ENGINE(tensors, gradients)
