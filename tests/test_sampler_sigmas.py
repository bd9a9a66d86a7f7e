import pytest
import torch

from deepinv_ud2m import UD2M, VPSchedule
from deepinv_ud2m.training import SamplerSigmas


@pytest.fixture
def model() -> UD2M:
    unfolded = torch.nn.Identity()
    unfolded.draw = lambda *arguments: None
    return UD2M(unfolded, sigmas=[50.0, 2.0, 0.3])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_own_sigmas(model, share):
    torch.manual_seed(0)
    sigmas = SamplerSigmas(model, share)(4000)
    assert sigmas.shape == (4000,) and bool((sigmas > 0).all())
    for own in model.sigmas:  # five standard deviations: false alarm of 6e-7 for each
        p = share / 3
        assert abs((sigmas == own).sum().item() - 4000 * p) <= 5 * (4000 * p * (1 - p)) ** 0.5


def test_other_sigmas_are_those_of_the_schedule(model):
    schedule = VPSchedule()
    torch.manual_seed(0)
    sigmas = SamplerSigmas(model, 0.0, schedule)(4000).log()
    reference = schedule.training_sigmas(4000).log()
    # Kolmogorov-Smirnov at a false alarm of 1e-4
    grid = torch.cat([sigmas, reference])
    gap = [(a[:, None] <= grid).double().mean(0) for a in (sigmas, reference)]
    assert (gap[0] - gap[1]).abs().max() < 2.226 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_share_out_of_range(model, share):
    with pytest.raises(ValueError, match="share must be in"):
        SamplerSigmas(model, share)
