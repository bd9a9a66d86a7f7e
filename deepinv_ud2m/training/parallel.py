"""Several processes, by :mod:`torch.distributed`; without it, everything here is that of one process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0, which alone writes."""
    return dist.get_rank() if world_size() > 1 else 0


def own_device() -> str:
    """The GPU of this process of ``torchrun``, the GPU where there is one process, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """The value of the first process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """
    Add up the gradients of all processes, in place, in one message.

    Not by DistributedDataParallel, which waits for ever for a process whose loss was not finite. A
    parameter that no process has a gradient of keeps none.

    :param Iterable[torch.nn.Parameter] parameters: the same in all processes.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    used = [any(of) for of in zip(*gather([p.grad is not None for p in parameters]), strict=True)]
    parameters = [p for p, is_used in zip(parameters, used, strict=True) if is_used]
    if not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, _unflatten_dense_tensors(flat, gradients), strict=True):
        parameter.grad = total.clone()


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """
    Give all processes the buffers of the first: those of spectral normalisation, say, which follow the
    batches that a process has seen.

    :param torch.nn.Module module: the same in all processes.
    """
    buffers = list(module.buffers())
    if world_size() == 1 or not buffers:
        return
    flat = _flatten_dense_tensors(buffers)
    dist.broadcast(flat, 0)
    for buffer, value in zip(buffers, _unflatten_dense_tensors(flat, buffers), strict=True):
        buffer.copy_(value)
