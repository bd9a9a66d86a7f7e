"""One update of an optimiser, from the gradients of several batches in several processes.

Each process computes the gradients of its own batches without a word to the others; one reduction adds them
up. DistributedDataParallel would wait for ever for a process that skips its backward pass.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from deepinv_ud2m.checks import check_count
from deepinv_ud2m.processes import leave_group
from deepinv_ud2m.unfolded import UnfoldedDenoiser


def start_accelerator(device: torch.device) -> tuple[Accelerator, torch.device]:
    """Join the other processes, if there are any; the accelerator, and the device of this process."""
    # Where there is an accelerator already, its device cannot be changed any more.
    accelerator = Accelerator(cpu=device.type == "cpu" and not is_initialized())
    atexit.register(leave_group)
    of_several = accelerator.num_processes > 1 and device.type == accelerator.device.type
    return accelerator, accelerator.device if of_several else device


class Update:
    """
    One update of an optimiser at a time. Where a loss or the gradient is not finite in any process, all
    processes leave the parameters as they are.

    :param accelerate.Accelerator accelerator: talks to the other processes.
    :param torch.optim.Optimizer optimizer: the optimiser.
    :param Sequence[torch.nn.Parameter] parameters: what it trains, the same in all processes.
    :param int batches: batches of each process.
    :param float grad_clip: largest norm of the gradient (default: ``None``, any).
    :param Callable lr_schedule: factor on the learning rates as a function of the step (default: 1).
    :raises ValueError: if the optimiser does not hold the parameters.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[Tensor],
        batches: int = 1,
        grad_clip: float | None = None,
        lr_schedule: Callable[[int], float] | None = None,
    ):
        self.accelerator, self.optimizer, self.parameters = accelerator, optimizer, list(parameters)
        self.batches, self.grad_clip, self.lr_schedule = batches, grad_clip, lr_schedule
        self.finite = True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(p) not in held for p in self.parameters)
        if missing:
            raise ValueError(
                f"optimizer does not hold {missing} of the parameters that are trained: make it after "
                "add_lora, of parameter_groups(model.unfolded)"
            )
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def start(self, step: int) -> None:
        """Forget the gradients, and set the learning rates of a step."""
        self.finite = True
        self.optimizer.zero_grad(set_to_none=True)
        factor = 1.0 if self.lr_schedule is None else self.lr_schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def add(self, losses: Sequence[Tensor]) -> list[float]:
        """
        Add the gradient of the sum of losses of one batch, if those of all processes are finite.

        :returns: the losses, averaged over processes.
        """
        stacked = torch.stack(list(losses))
        values = self.accelerator.reduce(stacked.detach(), "mean").tolist()
        self.finite = self.finite and all(map(math.isfinite, values))
        if self.finite:
            (stacked.sum() / self.batches).backward()
        return values

    def finish(self) -> float:
        """Average the gradients over processes, and clip them; their norm before."""
        if not self.finite:
            return math.nan
        if self.accelerator.num_processes > 1:
            self._average()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.grad_clip or math.inf).item()
        self.finite = math.isfinite(norm)
        return norm

    def apply(self) -> None:
        """Move the parameters."""
        self.optimizer.step()

    @torch.no_grad()
    def _average(self) -> None:
        """In one message. What has no gradient in any process keeps none, so the optimiser skips it."""
        device = self.parameters[0].device
        has_gradient = torch.tensor([float(p.grad is not None) for p in self.parameters], device=device)
        used = self.accelerator.reduce(has_gradient, "sum").tolist()
        parameters = [p for p, count in zip(self.parameters, used, strict=True) if count]
        if not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        mean = self.accelerator.reduce(parameters_to_vector(gradients), "mean")
        for p, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p).clone()


def parameter_groups(
    unfolded: UnfoldedDenoiser,
    lr: float = 1e-4,
    lr_scalars: float = 1e-3,
    lr_initializer: float = 1e-5,
    weight_decay: float = 0.01,
) -> list[dict]:
    """
    What is trained in an unfolded denoiser, as parameter groups of an optimiser.

    :param deepinv_ud2m.UnfoldedDenoiser unfolded: the unfolded denoiser, with its adapter.
    :param float lr: learning rate of what is trained in the prior (default: 1e-4, as in the paper's Table 9).
    :param float lr_scalars: of the logarithms of rho, lambda and delta (default: 1e-3).
    :param float lr_initializer: of what is trained in the initializer (default: 1e-5, Table 9).
    :param float weight_decay: of all but the scalars (default: 0.01, Table 9).
    :returns: the groups that have parameters, each with its ``name``: prior, scalars, initializer.
    """
    rates = {"denoiser": lr, "scalars": lr_scalars, "initializer": lr_initializer}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in unfolded.trained_parameters().items():
        if parameter.requires_grad:
            groups[name.partition(".")[0] if "." in name else "scalars"].append(parameter)
    return [
        {
            "name": "prior" if kind == "denoiser" else kind,
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": 0.0 if kind == "scalars" else weight_decay,
        }
        for kind, parameters in groups.items()
        if parameters
    ]


def warmup_cosine(total_steps: int, warmup_steps: int = 200, floor: float = 0.01) -> Callable[[int], float]:
    """
    Factor on the learning rate: linear warm-up, then half a cosine down to ``floor``.

    :param int total_steps: number of optimiser steps of the whole run.
    :param int warmup_steps: length of the warm-up, in steps (default: 200).
    :param float floor: factor at the end (default: 0.01).
    :returns: a function of the step.
    :raises ValueError: for fewer than one step of either.
    """
    check_count("total_steps", total_steps)
    check_count("warmup_steps", warmup_steps)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
        return min(1.0, (step + 1) / warmup_steps) * (floor + (1 - floor) * cosine)

    return factor
