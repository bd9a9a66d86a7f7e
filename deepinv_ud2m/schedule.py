r"""Noise levels: the only file that knows about variance-preserving (VP) diffusions.

Everywhere else a diffusion state is a noisy image at a noise level,

.. math:: x_s = x + s\,\varepsilon, \qquad \varepsilon \sim \mathcal N(0, I), \quad x \in [0, 1]^d .

A VP diffusion works on :math:`v_t = \sqrt{\bar\alpha_t}(2x - 1) + \sqrt{1 - \bar\alpha_t}\,\varepsilon`.
Dividing by :math:`\sqrt{\bar\alpha_t}` and mapping [-1, 1] to [0, 1] turns one into the other,

.. math:: x_s = \tfrac12 \left( v_t / \sqrt{\bar\alpha_t} + 1 \right), \qquad
          s(t) = \tfrac12 \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t} ,

exactly and invertibly. Times are 0-based, :math:`t \in \{0, \dots, T - 1\}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from deepinv_ud2m.checks import LARGEST, SMALLEST


class VPSchedule(nn.Module):
    r"""
    The levels :math:`s(t)` of a variance-preserving diffusion, as a function of continuous time.

    Between integer times :math:`\log s` is interpolated linearly.

    :param str kind: ``"linear"``: :math:`\beta_t` from 1e-4 to 0.02 (DDPM, ADM, and the paper), or
        ``"cosine"``: :math:`\bar\alpha_t \propto \cos^2(\tfrac{\pi}{2}((t + 1)/T + 0.008)/1.008)`
        (Nichol & Dhariwal 2021), both with :math:`\beta_t \leq 0.999`. Default: ``"linear"``.
    :param int num_timesteps: number :math:`T` of times, at least 2 (default: 1000).
    :raises ValueError: for another kind, or fewer than 2 times.

    |sep|

    :Examples:

        >>> from deepinv_ud2m.schedule import VPSchedule
        >>> VPSchedule().sampling_sigmas(3)
        tensor([78.7036,  1.2773,  0.1902])
    """

    kind: str
    num_timesteps: int
    log_levels: Tensor

    def __init__(self, kind: str = "linear", num_timesteps: int = 1000):
        super().__init__()
        if kind not in _BETAS:
            raise ValueError(f"kind must be one of {sorted(_BETAS)}, got {kind!r}")
        if not (isinstance(num_timesteps, Integral) and num_timesteps >= 2):
            raise ValueError(f"num_timesteps must be an integer >= 2, got {num_timesteps!r}")
        self.kind, self.num_timesteps = kind, num_timesteps
        alphas_cumprod = torch.cumprod(1 - _BETAS[kind](num_timesteps).clamp(max=0.999), 0)
        log_levels = 0.5 * torch.log((1 - alphas_cumprod) / alphas_cumprod) - math.log(2)
        self.register_buffer("log_levels", log_levels, persistent=False)

    def sigma(self, t: float | Tensor) -> Tensor:
        r"""
        The level :math:`s(t)`.

        :param float, torch.Tensor t: times in [0, T - 1], integer or not, of any shape.
        :returns: levels of the same shape, float32.
        """
        t = torch.as_tensor(t, dtype=self.log_levels.dtype, device=self.log_levels.device)
        below = t.floor().clamp(0, self.num_timesteps - 2).long()
        weight = t - below
        log_level = torch.lerp(self.log_levels[below], self.log_levels[below + 1], weight)
        return log_level.exp().float()

    def timestep(self, sigma: float | Tensor) -> Tensor:
        r"""
        The time at which the level is reached, the inverse of :meth:`sigma`.

        :param float, torch.Tensor sigma: levels, positive, of any shape; levels outside
            [s(0), s(T - 1)] give the nearest end.
        :returns: times in [0, T - 1] of the same shape, float32, not rounded.
        """
        sigma = torch.as_tensor(sigma, dtype=self.log_levels.dtype, device=self.log_levels.device)
        log_sigma = sigma.log().clamp(self.log_levels[0], self.log_levels[-1])
        above = torch.searchsorted(self.log_levels, log_sigma).clamp(1, self.num_timesteps - 1)
        low, high = self.log_levels[above - 1], self.log_levels[above]
        return (above - 1 + (log_sigma - low) / (high - low)).float()

    def sampling_sigmas(self, num_steps: int) -> Tensor:
        r"""
        The published grid of :math:`N` levels, largest first, dense at small times:

        .. math:: t_n = \lfloor (n \sqrt{T} / N)^2 \rfloor, \quad n = 1, \dots, N, \qquad t_N = T - 1 .

        Where two of these times coincide, near 0 for large N, the later is moved to the next free one.

        :param int num_steps: number :math:`N` of levels, at least 1.
        :returns: levels :math:`s_N > \dots > s_1 > 0`, of shape `[N]`, float32.
        :raises ValueError: if ``num_steps`` is not an integer in [1, T / 2].
        """
        if not (isinstance(num_steps, Integral) and 1 <= num_steps <= self.num_timesteps // 2):
            raise ValueError(
                f"num_steps must be an integer in [1, {self.num_timesteps // 2}], got {num_steps!r}"
            )
        roots = torch.linspace(0, self.num_timesteps**0.5, num_steps + 1, dtype=torch.float64)[1:]
        times = (roots**2 + 1e-9).floor()  # the last square is T up to rounding
        # Many steps crowd at t = 0: move each to the next free time.
        steps = torch.arange(num_steps)
        times = (times - steps).cummax(0).values + steps
        return self.sigma(times.clamp(max=self.num_timesteps - 1)).flip(0)

    def training_sigmas(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        r"""
        Levels for training, :math:`s(t)` with :math:`t` uniform in [1, T - 1], one per image.

        :param int batch_size: number of levels.
        :param torch.Generator generator: random generator, on the device of this schedule.
        :returns: levels of shape `[batch_size]`, float32.
        """
        uniform = torch.rand(batch_size, generator=generator, device=self.log_levels.device)
        return self.sigma(1 + uniform * (self.num_timesteps - 2))

    def extra_repr(self) -> str:
        return f"{self.kind!r}, num_timesteps={self.num_timesteps}"


def to_vp_state(x_s: Tensor, sigma: float | Tensor) -> Tensor:
    r"""
    The VP state of a noisy image, :math:`v_t = \sqrt{\bar\alpha}(2 x_s - 1)` with
    :math:`\bar\alpha = 1 / (1 + 4 s^2)`.

    :param torch.Tensor x_s: noisy images, of shape `[B, C, H, W]`, units of [0, 1].
    :param float, torch.Tensor sigma: their level :math:`s`, a scalar, `[B]` or `[B, 1, 1, 1]`.
    :returns: VP states of the same shape.
    """
    return (2 * x_s - 1) * _signal_scale(x_s, sigma)


def check_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    """
    Levels given by hand, as a tensor.

    :param sigmas: at least one level, in [1e-6, 1e6], strictly decreasing.
    :returns: tensor of shape `[N]`, float32.
    :raises ValueError: if they are not.
    """
    given = sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas
    message = (
        "sigmas must be a sequence of positive, strictly decreasing noise levels, in "
        f"[{SMALLEST:g}, {LARGEST:g}]; got {given!r}"
    )
    try:
        sigmas = torch.as_tensor(sigmas, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(message) from error
    decreasing = sigmas.ndim == 1 and len(sigmas) > 0 and bool((sigmas.diff() < 0).all())
    # NaN fails the comparisons. A copy, so that the caller cannot change it.
    if not decreasing or not bool(((sigmas >= SMALLEST) & (sigmas <= LARGEST)).all()):
        raise ValueError(message)
    return sigmas.clone()


def _signal_scale(x: Tensor, sigma: float | Tensor) -> Tensor:
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return (1 + 4 * sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2).rsqrt()


def _linear_betas(num_timesteps: int) -> Tensor:
    # The end points are those of T = 1000; scaled, other T give the same diffusion in fewer steps.
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)


def _cosine_betas(num_timesteps: int) -> Tensor:
    times = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_cumprod = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]


_BETAS = {"linear": _linear_betas, "cosine": _cosine_betas}
