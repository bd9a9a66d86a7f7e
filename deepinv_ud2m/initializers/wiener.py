"""An initial estimate from the power spectrum of images: the Wiener filter, for any linear physics."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from deepinv_ud2m.checks import check_count, check_number
from deepinv_ud2m.conjugate_gradients import regularised_least_squares
from deepinv_ud2m.initializers.base import Initializer
from deepinv_ud2m.initializers.linear import LinearInitializer
from deepinv_ud2m.physics.traits import is_circular
from deepinv_ud2m.problem import Problem


class WienerInitializer(Initializer):
    r"""
    The mean of x given y and x_s under a Gaussian prior with the power spectrum of natural images.

    The prior :math:`\mathcal N(\mu, C)` is stationary, and diagonal in the Fourier basis with powers

    .. math:: P(f) = a \, (|f|^2 + f_0^2)^{-\alpha / 2}

    at the frequency f in cycles per pixel. Channels have the correlation c. Given x_s, the covariance of x is
    :math:`C_s = (C^{-1} + s^{-2})^{-1}` and its mean :math:`\mu_s = \mu + C_s s^{-2} (x_s - \mu)`. Given y
    as well, the mean is

    .. math:: \mu_s + C_s A^\top (A C_s A^\top + \sigma_y^2)^{-1} (y - A \mu_s) .

    For circular convolutions, subsampled or not, this is the Wiener filter, in closed form. For other linear
    operators a few conjugate gradients solve it. The estimate fills masks smoothly and deblurs without
    ringing. :class:`deepinv_ud2m.LinearInitializer`, which treats pixels as independent, leaves grey pixels
    and blur. For operators that are not linear, such as JPEG, the estimate is that of
    :class:`deepinv_ud2m.LinearInitializer`.

    :param float mean: :math:`\mu` (default: 0.5).
    :param float scale: a, positive (default: 3.7e-4). This and the next three defaults fit photographs.
    :param float decay: :math:`\alpha`, non-negative (default: 2.5).
    :param float cutoff: :math:`f_0`, positive, in cycles per pixel (default: 0.0063).
    :param float correlation: c, of any two channels, in [0, 1) (default: 0.95).
    :param float tol: where there is no closed form, the iterations stop when the residual is below ``tol``
        times the solution (default: 1). Both are norms in coordinates in which the prior is white. The bound
        is loose, because the iterations of the sampler improve the estimate.
    :param int max_iter: most iterations (default: 40).
    :param float reference_level: see :class:`deepinv_ud2m.initializers.Initializer` (default: 0.2).
    :raises ValueError: for values outside of these ranges.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import Problem, WienerInitializer
        >>> physics = dinv.physics.Inpainting((3, 64, 64), mask=0.5)
        >>> x_s = torch.rand(1, 3, 64, 64)
        >>> x, h = WienerInitializer()(Problem(physics(x_s), physics, sigma_y=0.05), x_s, sigma=0.5)
        >>> x.shape, h.shape
        (torch.Size([1, 3, 64, 64]), torch.Size([1, 1, 1, 1]))
    """

    def __init__(
        self,
        mean: float = 0.5,
        scale: float = 3.7e-4,
        decay: float = 2.5,
        cutoff: float = 0.0063,
        correlation: float = 0.95,
        tol: float = 1.0,
        max_iter: int = 40,
        reference_level: float = 0.2,
    ):
        super().__init__(reference_level)
        self.mean, self.decay = check_number("mean", mean), check_number("decay", decay, low=0)
        self.scale = check_number("scale", scale, positive=True)
        self.cutoff = check_number("cutoff", cutoff, positive=True)
        self.tol, self.max_iter = check_number("tol", tol, positive=True), check_count("max_iter", max_iter)
        self.correlation = check_number("correlation", correlation, 0, 1)
        if self.correlation == 1:
            raise ValueError("correlation must be below 1: the channels would be the same")

    @classmethod
    def fit(cls, images: Tensor, **settings: Any) -> WienerInitializer:
        r"""
        The initializer of other images than photographs: mean, spectrum and correlation of a sample.

        The spectrum is averaged over rings of a third of an octave, so that all scales have the same weight.
        Its logarithm is fitted by least squares.

        :param torch.Tensor images: images of shape `[B, C, H, W]`, hundreds or more, 16 pixels or more
            in each direction.
        :param settings: ``tol``, ``max_iter`` and ``reference_level``.
        :raises ValueError: for another shape, images that are not finite, or that do not vary.
        """
        if images.ndim != 4 or min(images.shape[-2:]) < 16:
            raise ValueError(
                f"images must be of shape [B, C, H, W] with H and W at least 16, got {list(images.shape)}"
            )
        if not bool(images.isfinite().all()) or not images.std() > 0:
            raise ValueError("images must be finite and vary")
        images = images.double()
        mean = images.mean().item()
        spectrum = torch.fft.rfft2(images - mean, norm="ortho")
        power = spectrum.abs().square().mean((0, 1))
        of_mean = spectrum.mean(1).abs().square().mean(0)
        channels = images.shape[1]
        rings = _rings(images)
        powers, of_means, radii = (
            torch.stack([values[ring].mean() for ring in rings])
            for values in (power, of_mean, _frequencies(images).sqrt())
        )
        # Of the mean over channels, the power is P (1 + (C - 1) c) / C.
        correlation = (channels * of_means / powers - 1).mean().item() / max(channels - 1, 1)
        scale, decay, cutoff = _fit_spectrum(radii, powers)
        correlation = min(max(correlation, 0.0), 0.999)
        return cls(mean, scale, decay, cutoff, correlation, **settings)

    def estimate(self, problem: Problem, x_s: Tensor, sigma: Tensor) -> Tensor:
        if not problem.is_linear:
            return LinearInitializer(self.mean).estimate(problem, x_s, sigma)
        if x_s.dtype in (torch.float16, torch.bfloat16):
            x_s = x_s.float()
        sigma = _once(sigma).to(x_s.dtype)
        sigma_y = problem.sigma_y.to(x_s.dtype)
        variances = [1 / (1 / power + sigma**-2) for power in self.powers(x_s)]
        # The spectrum of mu_s - mu.
        spectrum = _weighted(torch.fft.rfft2(x_s - self.mean), [v * sigma**-2 for v in variances])
        if is_circular(problem.physics, x_s.shape):
            return self._wiener(problem, variances, spectrum, x_s, sigma_y)
        mean = self.mean + torch.fft.irfft2(spectrum, s=x_s.shape[-2:])
        return mean + self._solve(problem, mean, variances, sigma_y)

    def powers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """
        The eigenvalues of C: the powers of the mean over channels, and of the deviations from it.

        :param torch.Tensor like: images of shape `[B, C, H, W]`, which give size, dtype and device.
        :returns: two tensors of shape `[H, W // 2 + 1]`.
        """
        channels, c = like.shape[1], self.correlation
        power = self.scale * (_frequencies(like) + self.cutoff**2) ** (-self.decay / 2)
        return (1 + (channels - 1) * c) * power, (1 - c) * power

    def _wiener(
        self, problem: Problem, variances: list[Tensor], spectrum: Tensor, x_s: Tensor, sigma_y: Tensor
    ) -> Tensor:
        """
        The mean in the Fourier basis. A correlates with a kernel and subsamples; A^T of one impulse is this
        kernel. A C A^T is a convolution on the grid of the measurements.
        """
        y, size, factor = problem.y, x_s.shape[-2:], x_s.shape[-1] // problem.y.shape[-1]
        impulse = torch.zeros_like(y if problem.is_per_image else y[:1])
        impulse[..., 0, 0] = 1
        kernel = torch.fft.rfft2(problem.A_adjoint(impulse)[:, :1])

        def measured(spectrum: Tensor) -> Tensor:
            return torch.fft.irfft2(kernel.conj() * spectrum, s=size)[..., ::factor, ::factor]

        A_mean = self.mean * kernel[..., :1, :1].real
        gains = [
            1 / (torch.fft.rfft2(measured(kernel * variance)).real.clamp(min=0) + sigma_y**2)
            for variance in variances
        ]
        residual = torch.fft.rfft2(y - A_mean - measured(spectrum))
        weights = torch.zeros_like(x_s)
        weights[..., ::factor, ::factor] = torch.fft.irfft2(_weighted(residual, gains), s=y.shape[-2:])
        spectrum = spectrum + _weighted(kernel * torch.fft.rfft2(weights), variances)
        return self.mean + torch.fft.irfft2(spectrum, s=size)

    def _solve(self, problem: Problem, mean: Tensor, variances: list[Tensor], sigma_y: Tensor) -> Tensor:
        """Conjugate gradients, in coordinates in which the prior is white: a few suffice."""
        deviations = [variance.sqrt() for variance in variances]
        residual = _filtered(problem.adjoint.to(mean.dtype) - problem.A_adjoint_A(mean), deviations)
        spectra, preconditioner = problem.circular_spectra(), None
        if spectra is not None:
            # Without it, max_iter is not enough for tomography.
            gains = [1 / (1 + sigma_y**-2 * v * s) for v, s in zip(variances, spectra, strict=True)]
            preconditioner = lambda r: _filtered(r, gains)  # noqa: E731
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "posterior_prox stopped after")
            w = regularised_least_squares(
                *(torch.zeros_like(mean), residual, sigma_y**-2),
                lambda w: _filtered(problem.A_adjoint_A(_filtered(w, deviations)), deviations),
                tol=self.tol,
                max_iter=self.max_iter,
                preconditioner=preconditioner,
            )
        return _filtered(w, deviations)

    def config(self) -> dict:
        names = ("mean", "scale", "decay", "cutoff", "correlation", "tol", "max_iter")
        return {name: getattr(self, name) for name in names} | super().config()


def _once(sigma: Tensor) -> Tensor:
    """One level, if the tensor was expanded from one: the filters are then made once for all images."""
    return sigma[:1] if sigma.stride(0) == 0 else sigma


def _frequencies(like: Tensor) -> Tensor:
    """Squares of the frequencies of ``rfft2``, in cycles per pixel, `[H, W // 2 + 1]`."""
    options = {"dtype": like.dtype, "device": like.device}
    rows = torch.fft.fftfreq(like.shape[-2], **options)
    return rows[:, None] ** 2 + torch.fft.rfftfreq(like.shape[-1], **options) ** 2


def _rings(images: Tensor) -> list[Tensor]:
    """Masks of frequencies of about the same size, three per octave, without zero. None is empty."""
    octaves = (_frequencies(images).sqrt() * max(images.shape[-2:])).log2().mul(3).round()
    return [octaves == value for value in octaves.unique() if value.isfinite()]


def _fit_spectrum(radii: Tensor, powers: Tensor) -> tuple[float, float, float]:
    """Scale, decay and cutoff: for each cutoff a straight line is fitted in logarithms; the best one wins."""
    fits = []
    for cutoff in torch.logspace(-3, -1, 41, dtype=radii.dtype).tolist():
        logarithms = (radii**2 + cutoff**2).log() / 2
        line = torch.stack([torch.ones_like(logarithms), -logarithms], 1)
        (log_scale, decay), *_ = torch.linalg.lstsq(line, powers.log())
        error = (line @ torch.stack([log_scale, decay]) - powers.log()).square().sum()
        fits.append((error.item(), log_scale.exp().item(), max(decay.item(), 0.0), cutoff))
    return min(fits)[1:]


def _filtered(x: Tensor, gains: list[Tensor]) -> Tensor:
    """Two filters, see :func:`_weighted`."""
    return torch.fft.irfft2(_weighted(torch.fft.rfft2(x), gains), s=x.shape[-2:])


def _weighted(spectrum: Tensor, gains: list[Tensor]) -> Tensor:
    """Apply gains by frequency to the mean over the channels, and to the deviations from it."""
    if spectrum.shape[1] == 1:
        return gains[0] * spectrum
    mean = spectrum.mean(1, keepdim=True)
    return gains[1] * spectrum + (gains[0] - gains[1]) * mean
