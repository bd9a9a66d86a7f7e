"""What a computation holds in memory at most."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def reset_peak_memory(y: Tensor) -> None:
    if y.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        with contextlib.suppress(OSError):  # not everywhere allowed
            _CLEAR_REFS.write_text("5")


def peak_memory(y: Tensor) -> float:
    """
    In GiB, of the device; on the CPU resident memory, libraries and prior included: since the last
    reset on Linux, since the process started elsewhere.
    """
    if y.is_cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class LiveTensors(TorchDispatchMode):
    """
    Bytes of all tensors alive within a ``with`` block, those made before it included.

    Every operation is seen, of the backward pass and of what checkpointing computes again too, and a
    storage counts once, from the operation that makes it until nothing refers to it. So ``peak`` is what
    the caching allocator of a GPU would be asked for at most (:func:`torch.cuda.max_memory_allocated`),
    but for the rounding of each tensor to 512 bytes and for the workspaces inside the kernels.

    :ivar int bytes: held now.
    :ivar int peak: held at most so far.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: dict[int, weakref.finalize] = {}

    def __enter__(self) -> LiveTensors:
        gc.collect()
        # by type, since some objects of other libraries do not bear being asked for their class
        for tensor in (o for o in gc.get_objects() if issubclass(type(o), Tensor)):
            self._count(tensor)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for storage in self._storages.values():
            storage.detach()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            size = storage.nbytes()
            end = weakref.finalize(storage, self._forget, storage._cdata, size)
            self._storages[storage._cdata] = end
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _forget(self, storage: int, size: int) -> None:
        del self._storages[storage]
        self.bytes -= size
