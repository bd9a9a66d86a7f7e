"""What a computation takes: network evaluations (NFE), and memory."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

# torch numbers hooks without a lock: two threads could be given the same number.
_LOCK = threading.Lock()


class CallCounter:
    """
    A context manager that counts the images that go through networks, by hooks.

    It counts the calls of its own thread only, so several threads may use one network.

    :param Iterable[torch.nn.Module] networks: the networks to watch.
    :param Callable, None done: is called with the number of images after each pass.
    """

    def __init__(self, networks: Iterable[nn.Module], done: Callable[[int], None] | None = None):
        self.networks, self.done = list(networks), done
        self.images = 0

    def __enter__(self) -> CallCounter:
        self._thread = threading.get_ident()
        with _LOCK:
            self._hooks = [net.register_forward_hook(self._count) for net in self.networks]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, network: nn.Module, inputs: tuple, output: Tensor) -> None:
        if threading.get_ident() == self._thread:
            self.images += len(output)
            if self.done is not None:
                self.done(len(output))


def peak_gb(device: torch.device) -> float:
    """Peak memory since the last call: of the GPU, or of the process, except on Linux since its start."""
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak / 2**30
