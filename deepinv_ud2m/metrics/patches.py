r"""Has an image the texture of another? Distances between the distributions of their patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepinv_ud2m.checks import check_count


@torch.no_grad()
def sliced_wasserstein(
    x_hat: Tensor,
    x: Tensor,
    num_levels: int = 3,
    patch_size: int = 7,
    num_projections: int = 128,
    seed: int = 0,
) -> Tensor:
    r"""
    Sliced Wasserstein distance between the patches of two images, on the detail levels of their Laplacian
    pyramids, after `Karras et al., 2018 <https://arxiv.org/abs/1710.10196>`_.

    On each level, all patches of an image are projected on random directions :math:`v` of length 1. The
    distance is the mean over directions of the Wasserstein distance :math:`W_1` of the projections, that of
    two sorted lists:

    .. math::

        \mathrm{SWD} = \frac{1}{L} \sum_\ell \mathbb{E}_v\, \frac{1}{P} \sum_p
        \bigl| (v^\top \hat q^\ell)_{(p)} - (v^\top q^\ell)_{(p)} \bigr| .

    Where a patch lies does not matter. So a sample with another draw of the same texture has a small
    distance to the truth, and a smooth image, such as a posterior mean, a large one. Lower is better. There
    are two differences from the reference: each image is compared with its own truth, and patches keep their
    contrast.

    :param torch.Tensor x_hat: one sample of each image, `[B, C, H, W]` in [0, 1].
    :param torch.Tensor x: true images `[B, C, H, W]` in [0, 1].
    :param int num_levels: detail levels, each of half the size of the one before; those that are smaller
        than a patch are left out.
    :param int patch_size: side of the patches in pixels.
    :param int num_projections: number of random directions.
    :param int seed: of the directions.
    :return: distance of each image, `[B]`, in units of [0, 1].
    :raises ValueError: for other shapes, images that are smaller than a patch, or numbers below 1.

    :Examples:

    >>> import torch
    >>> from deepinv_ud2m.metrics import sliced_wasserstein
    >>> x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> sliced_wasserstein(x, x), sliced_wasserstein(0.5 * x, x) > 0.05
    (tensor([0.]), tensor([True]))
    """
    for name, value in (("num_levels", num_levels), ("patch_size", patch_size)):
        check_count(name, value)
    check_count("num_projections", num_projections)
    if x.ndim != 4 or x_hat.shape != x.shape:
        raise ValueError(
            f"x_hat and x must be images [B, C, H, W] of one shape, got {[*x_hat.shape]} and {[*x.shape]}"
        )
    if min(x.shape[-2:]) < patch_size:
        raise ValueError(f"x must have sides of at least patch_size = {patch_size}, got {[*x.shape]}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_projections, x.shape[1], patch_size, patch_size, generator=generator)
    directions = (directions / directions.flatten(1).norm(dim=1)[:, None, None, None]).to(x)
    levels = [_details(images, num_levels, patch_size) for images in (x_hat, x)]
    distances = []
    for detail_hat, detail in zip(*levels, strict=True):
        # The projections of all patches are a convolution.
        lists = [F.conv2d(d, directions).flatten(2).sort().values for d in (detail_hat, detail)]
        distances.append((lists[0] - lists[1]).abs().mean((1, 2)))
    return torch.stack(distances).mean(0)


def _details(x: Tensor, num_levels: int, patch_size: int) -> list[Tensor]:
    """The detail levels of a Laplacian pyramid, the finest first."""
    details: list[Tensor] = []
    while len(details) < num_levels and min(x.shape[-2:]) >= patch_size:
        size = [max(1, side // 2) for side in x.shape[-2:]]
        coarse = F.interpolate(x, size, mode="bilinear", antialias=True)
        details.append(x - F.interpolate(coarse, x.shape[-2:], mode="bilinear"))
        x = coarse
    return details
