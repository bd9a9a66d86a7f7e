"""Updates whose loss or gradient is not finite are skipped."""

import math
from itertools import pairwise

import pytest
import torch
from deepinv.loss import Loss
from distillation import equal, make_adversary, make_trainer, values_of

from deepinv_ud2m.processes import leave_group
from deepinv_ud2m.training import AdversarialDiscriminatorLoss
from deepinv_ud2m.training.checkpoints import read_checkpoint


class SometimesNaN(Loss):
    """Not finite in the given steps, itself or, with ``gradient``, its gradient alone."""

    def __init__(self, steps, gradient=False):
        super().__init__()
        self.bad, self.gradient = steps, gradient

    def forward(self, x, x_net, epoch, **kwargs):
        loss = (x_net - x).square().flatten(1).mean(1)
        if epoch not in self.bad:
            return loss
        return loss + (0 * x_net).sqrt().sum() if self.gradient else loss * math.nan


@pytest.mark.parametrize("gradient", [False, True])
def test_steps_that_are_not_finite_are_skipped_and_leave_no_trace(tiny_prior, gradient):
    losses, seen, backward = SometimesNaN({1, 3}, gradient), [], []
    trainer = make_trainer(tiny_prior, losses=losses, steps=5, max_skipped=2, log_interval=2)

    def train_step(n, step=trainer.train_step):
        logs = step(n)
        seen.append(values_of(trainer))
        backward.append(any(p.grad is not None for p in trainer.trained.values()))
        return logs

    trainer.train_step = train_step
    trainer.train()
    assert trainer.skipped == 2
    assert backward == [True, gradient, True, gradient, True], "found out before the backward pass"
    assert [equal(a, b) for a, b in pairwise(seen)] == [True, False, True, False]
    assert all(value.isfinite().all() for value in seen[-1])
    assert [step for step, _ in trainer.history["loss"]] == [2, 4]
    assert all(math.isfinite(value) for _, value in trainer.history["loss"])


def test_too_many_in_a_row_stop_training_with_the_last_weights_saved(tiny_prior, tmp_path):
    options = {"losses": SometimesNaN(range(2, 9)), "max_skipped": 3, "save_path": tmp_path}
    make_trainer(tiny_prior, **options, steps=4).train()
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row, up to step 4.*checkpoint"):
        make_trainer(tiny_prior, **options, steps=9).train()
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 5 and state["skipped"] == [3, 3], "those before the resumption count"
    make_trainer(tiny_prior, losses=SometimesNaN(()), save_path=tmp_path / "good", steps=2).train()
    good = read_checkpoint(tmp_path / "good" / "checkpoint.pt")
    assert all(torch.equal(value, good["trained"][name]) for name, value in state["trained"].items())
    # It may go on from there, past the batches that were not finite.
    trainer = make_trainer(tiny_prior, **options | {"losses": SometimesNaN(())}, steps=6)
    trainer.train()
    assert trainer.skipped == 3 and trainer.skipped_in_a_row == 0


class NaNFrom(AdversarialDiscriminatorLoss):
    """A discriminator's loss that is not finite from a step on."""

    def forward(self, epoch, **kwargs):
        return super().forward(**kwargs) * (math.nan if epoch >= 2 else 1.0)


def test_a_discriminator_that_is_not_finite_stops_training_too(tiny_prior):
    adversary, seen = make_adversary(losses=NaNFrom()), []
    options = {"adversary": adversary, "steps": 9, "max_skipped": 3}
    trainer = make_trainer(tiny_prior, adversarial=True, **options)
    trainer.train_step = lambda n, step=trainer.train_step: (step(n), seen.append(values_of(trainer)))[0]
    with pytest.raises(RuntimeError, match="not finite in 3 steps in a row, up to step 4"):
        trainer.train()
    assert equal(seen[1], seen[-1]), "the model stays as it was too"
    assert all(parameter.isfinite().all() for parameter in adversary.D.parameters())


def test_a_process_leaves_its_group():
    """Once, and without harm where there is none."""
    leave_group()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    leave_group()
    assert not torch.distributed.is_initialized()
    leave_group()
