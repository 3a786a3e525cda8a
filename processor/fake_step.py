"""A training step on fake tensors: its peak memory by kind and its floating-point operations, without computing it.

Fake tensors have shapes and no content. The real encoder, losses, backward pass and optimizer run on them, and a
dispatch mode adds up the sizes of the storages that are alive. Temporary buffers inside a kernel and the fragmentation
of an allocator are not seen.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Config
from model.build import random_task
from model.task import EMBEDDINGS, RetrievalTask
from model.teacher import CachedTeacher
from processor.gradient_cache import backward
from processor.moving_average import MovingAverage
from processor.random_batch import micro_batches_of, random_batch, rows_per_pair
from solver.optimizer import build_optimizer
from utils.batch import MicroBatch
from utils.distributed import alone
from utils.precision import autocast

P = ParamSpec("P")
T = TypeVar("T")
WEIGHTS, GRADIENTS, OPTIMIZER, BATCH = "weights", "gradients", "optimizer", "batch"
ACTIVATIONS, LOSSES, TEMPORARY = "activations", "losses", "temporary"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, BATCH, ACTIVATIONS, LOSSES, TEMPORARY)


@dataclass(frozen=True)
class Cost:
    """Needs of a training step."""

    memory: Mapping[str, int]  # kind -> bytes, at the moment of the peak
    flops: int  # floating-point operations of products, convolutions and attention, repeated forward passes included

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return sum(self.memory.values())


class FakeStep:
    """The training step of a config, on fake tensors.

    Args:
        config: resolved config.
        num_pids: number of training identities.
        num_pairs: number of training pairs, for a cached teacher.
        device: device of the fake tensors.

    Raises:
        ConfigError: as `build_task`.
    """

    def __init__(self, config: Config, num_pids: int, num_pairs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        with torch.device("meta"):  # some constructors read values, which fake tensors lack
            task = random_task(config, num_pids)
            teacher = task.teacher
        self._mode, self._memory = FakeTensorMode(allow_non_fake_inputs=True), _Memory()
        with self._faking(WEIGHTS):
            if isinstance(teacher, CachedTeacher) and teacher.source is not None:
                dim = teacher.source.encoder.embed_dim
                teacher.fill(*(torch.empty(num_pairs, dim, device=device) for _ in range(2)))
            self.task: RetrievalTask = task.to_empty(device=device).train()
            for module in filter(None, (self.task, teacher)):
                for tensor in (*module.parameters(), *module.buffers()):
                    self._memory.add(tensor)
            self.average = None if config.train.ema is None else MovingAverage(self.task.encoder, config.train.ema)
        with self._faking(OPTIMIZER):
            self.optimizer = build_optimizer(config.solver, self.task.named_parameters())
        for parameter in self.task.parameters():
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
        for _, objective in self.task.named_objectives():
            objective.forward = self._memory.inside(LOSSES, objective.forward)  # type: ignore[method-assign]
        self.memory(self.batch(2, accumulate=1))  # makes the state of the optimizer

    def batch(self, pairs: int, *, accumulate: int | None = None) -> list[MicroBatch]:
        """A batch with captions of full length, in `accumulate` micro-batches (None: as the config says)."""
        with self._faking(BATCH), alone():
            fields = random_batch(
                self.config, pairs, self.task.encoder.vocab_size, self.task.inputs, device=self.device
            )
            return micro_batches_of(fields, accumulate or self.config.train.accumulate, rows_per_pair(self.config))

    def like(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Fake micro-batches with the shapes of real ones."""
        with self._faking(BATCH):
            return [
                MicroBatch(
                    {
                        name: torch.empty(value.shape, dtype=value.dtype, device=self.device)
                        for name, value in fields.items()
                        if name in self.task.inputs
                    },
                    shard,
                )
                for fields, shard in micro_batches
            ]

    def cost(self, micro_batches: Sequence[MicroBatch]) -> Cost:
        """Run a step. It is that of a single process, whatever the number of processes."""
        with FlopCounterMode(display=False) as flops:
            memory = self.memory(micro_batches)
        return Cost(memory, flops.get_total_flops())

    def memory(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """Kind -> bytes at the peak of a step."""
        self._memory.start()
        with self._faking(TEMPORARY), alone():
            with torch.autograd.graph.saved_tensors_hooks(self._memory.save, lambda saved: saved):
                precision = self.config.train.precision
                backward(self.task, micro_batches, device=self.device, precision=precision, scale=lambda loss: loss)
            if self.config.train.clip_grad is not None:
                clip_grad_norm_(self.task.parameters(), self.config.train.clip_grad)
            self._memory.inside(OPTIMIZER, self.optimizer.step)()
            self.optimizer.zero_grad(set_to_none=True)
        return self._memory.peak

    def memory_of_embeddings(self, pairs: int) -> int:
        """Bytes at the peak of the losses on the embeddings of a batch, and of the embeddings themselves."""
        precision = self.config.train.precision
        with self._faking(TEMPORARY), alone():
            before = sum(self._memory.now.values())
            with torch.no_grad(), autocast(self.device, precision):
                small = self.task.encode(self.batch(1, accumulate=1)[0].fields)[0]
            number = pairs * rows_per_pair(self.config)
            rows = {name: value.new_empty(number, *value.shape[1:]) for name, value in small.items()}
            leaves = [value.requires_grad_() for name, value in rows.items() if name.startswith(EMBEDDINGS)]
            del small
            self._memory.start()
            with autocast(self.device, precision):
                total, _ = self.task.losses(self.task.step(rows), tokens=False)
            if total.requires_grad:
                total.backward()
            self.optimizer.zero_grad(set_to_none=True)
        del leaves
        return sum(self._memory.peak.values()) - before

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._memory.count(parameter.grad, GRADIENTS)

    @contextlib.contextmanager
    def _faking(self, kind: str) -> Iterator[None]:
        with self._mode, self._memory, self._memory.making(kind):
            yield


class _Memory(TorchDispatchMode):
    """Bytes of the storages alive, by kind, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = dict.fromkeys(KINDS, 0)
        self.kind = TEMPORARY  # of new storages
        self._alive: dict[int, tuple[str, int]] = {}  # address of a storage -> kind, bytes
        self.start()

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak, self._most = dict(self.now), sum(self.now.values())

    def __torch_dispatch__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # of a random draw: IVT drops no token
        if (
            func is torch.ops.aten.clone.default
            and not isinstance(args[0], FakeTensor)
            and args[0].dtype == torch.uint8
        ):
            return args[0]  # the state of a GPU's random numbers, which is restored before each micro-batch
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = self.kind, storage.nbytes()
        self.now[self.kind] += storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata)
        if (total := sum(self.now.values())) > self._most:
            self.peak, self._most = dict(self.now), total

    def count(self, tensor: Tensor, kind: str) -> None:
        """Change the kind of a tensor's storage, if it is alive."""
        place = tensor.untyped_storage()._cdata
        if place in self._alive:
            before, size = self._alive[place]
            self._alive[place] = kind, size
            self.now[before] -= size
            self.now[kind] += size

    def save(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept for the backward pass."""
        kind, _ = self._alive.get(tensor.untyped_storage()._cdata, (None, 0))
        if kind == TEMPORARY:
            self.count(tensor, ACTIVATIONS)
        return tensor

    @contextlib.contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Give new storages a kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def inside(self, kind: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, whose new storages have a kind."""

        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.making(kind):
                return function(*args, **kwargs)

        return wrapped

    def _free(self, place: int) -> None:
        kind, size = self._alive.pop(place)
        self.now[kind] -= size
