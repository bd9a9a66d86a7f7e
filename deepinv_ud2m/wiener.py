"""A first guess of x that knows the spectrum of images: the Wiener filter, for any linear physics."""

from __future__ import annotations

import warnings

import torch
from deepinv.physics import BlurFFT, Downsampling, LinearPhysics, Physics
from deepinv.utils import TensorList
from torch import Tensor, nn

from deepinv_ud2m.batching import RepeatedPhysics
from deepinv_ud2m.checks import check_count
from deepinv_ud2m.initializers import LinearInitializer
from deepinv_ud2m.proximal import Scalar, expand_scalar, has_closed_form, posterior_prox


class WienerInitializer(nn.Module):
    r"""
    The mean of x given y and x_s under a Gaussian prior with the power spectrum of natural images.

    The prior :math:`\mathcal N(\mu, C)` is stationary, and diagonal in the Fourier basis with powers

    .. math:: P(f) = a \, (|f|^2 + f_0^2)^{-\alpha / 2}

    at the frequency f in cycles per pixel; channels correlate by c. With the precisions of x_s added,
    :math:`C_s = (C^{-1} + s^{-2})^{-1}` and :math:`\mu_s = \mu + C_s s^{-2} (x_s - \mu)`, the mean is

    .. math:: \mu_s + C_s A^\top (A C_s A^\top + \sigma_y^2)^{-1} (y - A \mu_s) .

    For circular convolutions, subsampled or not, this is the Wiener filter, in closed form; for other
    linear operators it is solved by conjugate gradients, of which a few suffice for a first guess. It
    fills masks smoothly and deblurs without ringing, where :class:`deepinv_ud2m.LinearInitializer`,
    which knows nothing of neighbours, leaves grey pixels and blur for the network to mend.

    :param float mean: :math:`\mu` (default: 0.5).
    :param float scale: a, positive (default: 3.7e-4, which fits photographs, as do those below).
    :param float decay: :math:`\alpha`, non-negative (default: 2.5).
    :param float cutoff: :math:`f_0`, positive, in cycles per pixel (default: 0.0063).
    :param float correlation: c, of each two channels, in [0, 1) (default: 0.95).
    :param float tol: where no closed form is known, the iterations stop at a residual of ``tol`` times
        the solution, both in coordinates in which the prior is white: a loose bound, since it is a first
        guess (default: 1).
    :param int max_iter: and after so many iterations (default: 40).
    :raises ValueError: for values outside of these ranges.

    |sep|

    :Examples:

        >>> import deepinv as dinv, torch
        >>> from deepinv_ud2m import WienerInitializer
        >>> physics = dinv.physics.Inpainting((3, 64, 64), mask=0.5)
        >>> x_s = torch.rand(1, 3, 64, 64)
        >>> WienerInitializer()(physics(x_s), physics, x_s, sigma=0.5, sigma_y=0.05).shape
        torch.Size([1, 3, 64, 64])
    """

    #: Its arguments, which are its attributes too.
    SETTINGS = ("mean", "scale", "decay", "cutoff", "correlation", "tol", "max_iter")

    def __init__(
        self,
        mean: float = 0.5,
        scale: float = 3.7e-4,
        decay: float = 2.5,
        cutoff: float = 0.0063,
        correlation: float = 0.95,
        tol: float = 1.0,
        max_iter: int = 40,
    ):
        super().__init__()
        for name, value in (("scale", scale), ("cutoff", cutoff), ("tol", tol)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= decay < float("inf"):
            raise ValueError(f"decay must be finite and >= 0, got {decay}")
        if not 0 <= correlation < 1:
            raise ValueError(f"correlation must be in [0, 1), got {correlation}")
        self.mean, self.scale, self.decay, self.cutoff = mean, scale, decay, cutoff
        self.correlation, self.max_iter = correlation, check_count("max_iter", max_iter)
        self.tol = tol

    @classmethod
    def fit(cls, images: Tensor, **settings) -> WienerInitializer:
        r"""
        The initialiser of other images than photographs: mean, spectrum and correlation of a sample.

        The spectrum is averaged over rings of an octave's third, so that each scale counts alike, and
        the logarithms are fitted by least squares.

        :param torch.Tensor images: images of shape `[B, C, H, W]`, hundreds or more, 16 pixels or more
            in each direction.
        :param settings: ``tol`` and ``max_iter``.
        :raises ValueError: for another shape, images that are not finite, or that do not vary.
        """
        if images.ndim != 4 or min(images.shape[-2:]) < 16:
            raise ValueError(
                "images must be of shape [B, C, H, W] with H and W at least 16, got "
                f"{list(images.shape)}"
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

    def forward(
        self, y: Tensor | TensorList, physics: Physics, x_s: Tensor, sigma: Scalar, sigma_y: Scalar
    ) -> Tensor:
        """
        The arguments of :meth:`deepinv_ud2m.LinearInitializer.forward`; it stands in for
        operators that are not linear, such as JPEG.
        """
        operator = physics.physics if isinstance(physics, RepeatedPhysics) else physics
        if not isinstance(operator, LinearPhysics):
            return LinearInitializer(self.mean)(y, physics, x_s, sigma, sigma_y)
        with torch.autocast(x_s.device.type, enabled=False):
            if x_s.dtype in (torch.float16, torch.bfloat16):
                x_s = x_s.float()
            is_one_level = torch.as_tensor(sigma).numel() == 1
            sigma, sigma_y = expand_scalar(sigma, x_s, "sigma"), expand_scalar(sigma_y, x_s, "sigma_y")
            if is_one_level:
                sigma = sigma[:1]
            variances = [1 / (1 / power + sigma**-2) for power in self.powers(x_s)]
            # Its filters take deviations from mu, the mean's: (x_s - mu) to mu_s - mu.
            spectrum = _weighted(torch.fft.rfft2(x_s - self.mean), [v * sigma**-2 for v in variances])
            kernel = _circular_kernel(operator, physics, x_s.shape)
            if kernel is not None:
                return self._wiener(y, physics, kernel, variances, spectrum, x_s, sigma_y)
            mean = self.mean + torch.fft.irfft2(spectrum, s=x_s.shape[-2:])
            return mean + self._solve(y - physics.A(mean), physics, variances, x_s, sigma_y)

    def powers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """
        :math:`P(f)` of the mean over channels and of the deviations from it, times their eigenvalues.

        :param torch.Tensor like: images of shape `[B, C, H, W]`, which give size, dtype and device.
        :returns: two tensors of shape `[H, W // 2 + 1]`.
        """
        channels = like.shape[1]
        power = self.scale * (_frequencies(like) + self.cutoff**2) ** (-self.decay / 2)
        c = self.correlation if channels > 1 else 0.0
        return (1 + (channels - 1) * c) * power, (1 - c) * power

    def _wiener(self, y, physics, kernel, variances, spectrum, x_s, sigma_y) -> Tensor:
        """
        All in the Fourier basis. A^T of one impulse tells A, which correlates with it and subsamples;
        A C A^T is a convolution on the grid of the measurements.
        """
        size, factor = x_s.shape[-2:], x_s.shape[-1] // y.shape[-1]
        is_same_for_all = len(kernel) == 1
        impulse = torch.zeros_like(y[:1] if is_same_for_all else y)
        impulse[..., 0, 0] = 1
        spread = torch.fft.rfft2(physics.A_adjoint(impulse)[:, :1])

        def measured(spectrum):
            return torch.fft.irfft2(spread.conj() * spectrum, s=size)[..., ::factor, ::factor]

        of_grey = self.mean * spread[..., :1, :1].real
        gains = [
            1 / (torch.fft.rfft2(measured(spread * variance)).real.clamp(min=0) + sigma_y**2)
            for variance in variances
        ]
        residual = torch.fft.rfft2(y - of_grey - measured(spectrum))
        weights = torch.zeros_like(x_s)
        weights[..., ::factor, ::factor] = torch.fft.irfft2(_weighted(residual, gains), s=y.shape[-2:])
        spectrum = spectrum + _weighted(spread * torch.fft.rfft2(weights), variances)
        return self.mean + torch.fft.irfft2(spectrum, s=size)

    def _solve(self, residual, physics, variances, x_s, sigma_y) -> Tensor:
        """In coordinates in which the prior is white, and a few conjugate gradients get far."""
        deviations = [variance.sqrt() for variance in variances]
        white, zero = _Coloured(physics, deviations), torch.zeros_like(x_s)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "posterior_prox stopped after")
            w = posterior_prox(
                *(zero, residual, white, zero, float("inf")),
                rho=1.0,
                sigma_y=sigma_y,
                tol=self.tol,
                max_iter=self.max_iter,
            )
        return _filtered(w, deviations)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name):.4g}" for name in self.SETTINGS)


class _Coloured(LinearPhysics):
    """A physics of images that are filtered first, by a symmetric filter."""

    def __init__(self, physics: Physics, gains: list[Tensor]):
        super().__init__()
        self.physics, self.gains = physics, gains

    def A(self, x: Tensor, **kwargs) -> Tensor | TensorList:
        return self.physics.A(_filtered(x, self.gains), **kwargs)

    def A_adjoint(self, y: Tensor | TensorList, **kwargs) -> Tensor:
        return _filtered(self.physics.A_adjoint(y, **kwargs), self.gains)


def _frequencies(like: Tensor) -> Tensor:
    """Squares of the frequencies of ``rfft2``, in cycles per pixel, `[H, W // 2 + 1]`."""
    options = {"dtype": like.dtype, "device": like.device}
    rows = torch.fft.fftfreq(like.shape[-2], **options)
    return rows[:, None] ** 2 + torch.fft.rfftfreq(like.shape[-1], **options) ** 2


def _rings(images: Tensor) -> list[Tensor]:
    """Masks of frequencies of about the same size, without zero; three to an octave, none empty."""
    octaves = (_frequencies(images).sqrt() * max(images.shape[-2:])).log2().mul(3).round()
    return [octaves == value for value in octaves.unique() if value.isfinite()]


def _fit_spectrum(radii: Tensor, powers: Tensor) -> tuple[float, float, float]:
    """Scale, decay and cutoff: a straight line in logarithms for each cutoff, of which the best."""
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
    """Gains by frequency, of the mean over the channels and of the deviations from it."""
    if spectrum.shape[1] == 1:
        return gains[0] * spectrum
    mean = spectrum.mean(1, keepdim=True)
    return gains[1] * spectrum + (gains[0] - gains[1]) * mean


def _circular_kernel(operator: Physics, physics: Physics, shape: torch.Size) -> Tensor | None:
    """The kernel, where A C A^T is a circular convolution, alike in all channels, for stationary C."""
    if not isinstance(operator, BlurFFT | Downsampling) or not has_closed_form(physics, shape):
        return None
    kernel = operator.filter
    is_same = kernel is not None and torch.equal(kernel, kernel[:, :1].expand_as(kernel))
    return kernel if is_same else None
