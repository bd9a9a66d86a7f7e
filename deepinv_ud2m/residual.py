r"""Whether samples explain the measurements, and what the noise level is.

A sample of the posterior leaves the residual that the true image leaves: :math:`A \hat x - y` has the law of
the noise. Its root mean square is :math:`\sigma_y`, whatever the operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepinv_ud2m.measurements import parts, too_bright
from deepinv_ud2m.problem import Problem

#: Root mean square residuals, in noise levels, beyond which a sample contradicts its problem. Those of the
#: shipped samplers in right problems are 0.8 to 1.5 at noise levels of 0.025 or more.
LOW, HIGH = 0.7, 1.7

#: What samplers miss besides noise, in units of y. At low noise levels it is larger than the noise.
_MODEL_ERROR = 0.015

#: A residual that is so much larger at the borders than inside, and than the noise, is one of the borders.
_BORDER_RATIO, _BORDER_LEVEL = 1.4, 1.3

#: Levels between which the noise is looked for, where the search starts, and its passes.
_LEVELS, START_LEVEL, _PASSES = (1e-3, 1.0), 0.05, 4


def relative_residual(problem: Problem, x: Tensor) -> Tensor | None:
    r"""
    The root mean square of :math:`(A x - y) / \sigma_y` over what was measured. It is about 1 if all is
    right.

    Measurements that are zero, and zero for x too, such as those outside of a mask, do not count.

    :param deepinv_ud2m.Problem problem: the problem.
    :param torch.Tensor x: one sample of each image, `[B, C, H, W]`, or `[B, 1, H, W]` of a grey problem.
    :returns: of shape `[B]`; ``None`` if the physics is not linear.
    """
    return _relative(problem, _measurements(problem, x)) if problem.is_linear else None


def _relative(problem: Problem, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    power: Any = 0
    count: Any = 0
    for a, y in pairs:
        measured = ((a != 0) | (y != 0)).flatten(1).sum(1)
        # Complex noise has the level sigma_y in the real and in the imaginary part.
        count = count + measured * (2 if y.is_complex() else 1)
        power = power + (a - y).abs().square().flatten(1).sum(1)
    return (power / count.clamp(min=1)).sqrt() / problem.sigma_y.flatten()


def check_residual(problem: Problem, x: Tensor) -> Tensor | None:
    r"""
    :func:`relative_residual`, with a warning that names likely causes if it is, for any image,

    - above 1.7. At low noise samplers miss y by more: :math:`((1.7 \sigma_y)^2 + 0.015^2)^{1/2}` is allowed;
    - below 0.7, unless the noise level is the floor that is assumed where none is given;
    - larger at the borders than inside.

    :param deepinv_ud2m.Problem problem: the problem.
    :param torch.Tensor x: one sample of each image, as the user gets it.
    """
    if not problem.is_linear:
        return None
    pairs = _measurements(problem, x)
    found, level = _relative(problem, pairs), problem.sigma_y.flatten()
    excess, worst = (found * level / ((HIGH * level) ** 2 + _MODEL_ERROR**2).sqrt()).max(0)
    of_borders = _is_at_the_borders(problem, pairs)
    if not bool(excess <= 1):  # NaN is not
        causes = _causes(problem, pairs, int(worst), of_borders)
        _warn("the samples do not explain y", causes, found, level, worst)
    elif of_borders:
        _warn("the samples do not explain y at the borders", [_BORDERS], found, level, worst)
    elif bool(found.min() < LOW) and not problem.level_is_assumed:
        _warn("the samples are nearer to y than its noise", [], found, level, found.argmin())
    return found


def estimate_noise(problem: Problem, sample: Callable[[Problem], Tensor]) -> Tensor:
    r"""
    The noise level of measurements: the one that samples drawn with it leave as their residual.

    Samples drawn with a level that is too low or too high leave about the true one already, so that a few
    passes find it.

    :param deepinv_ud2m.Problem problem: the problem; its level is where the search starts.
    :param Callable sample: gives one sample of each image of a problem.
    :returns: levels, of shape `[B]`, in [0.001, 1].
    :raises TypeError: if the physics is not linear.
    """
    if not problem.is_linear:
        name = type(problem.physics).__name__
        raise TypeError(f"sigma_y='estimate' needs a linear physics, got {name}: give the level")
    for _ in range(_PASSES):
        level = problem.sigma_y.flatten()
        found = (_relative(problem, _measurements(problem, sample(problem))) * level).clamp(*_LEVELS)
        problem = problem.of(problem.y, found.view(-1, 1, 1, 1))
        if bool(((found / level).log().abs() < 0.05).all()):
            break
    return found


_BORDERS = (
    "borders of the operator that are not those of y (a camera sees what is beyond the image, as "
    "padding='valid' does; no camera is circular)"
)


def _warn(what: str, causes: list[str], found: Tensor, level: Tensor, image: Tensor) -> None:
    residual, sigma_y = found[image].item(), level[image].item()
    if not residual < float("inf"):
        causes = ["the samples are not finite: does y fit the operator, and is its adjoint one?"]
    if residual > HIGH or residual < LOW:
        size = "large" if residual < LOW else "small"
        causes = [*causes, f"sigma_y is too {size}: {residual * sigma_y:.2g} would fit (or 'estimate')"]
    if residual > HIGH:
        causes.append(
            "another kernel, mask or border than that of y, or an operator unlike those that the sampler was "
            "trained with"
        )
    warnings.warn(
        f"{what}: the residual is {residual:.3g} times sigma_y = {sigma_y:.3g}. Likely causes, the likeliest "
        f"first: {'; '.join(causes)}",
        stacklevel=5,
    )


def _causes(problem: Problem, pairs: list, image: int, of_borders: bool) -> list[str]:
    """What the residual of an image looks like."""
    causes = list(_of_range(problem, pairs, image))
    if of_borders:
        causes.append(_BORDERS)
    if problem.level_is_assumed:
        causes.append(f"no noise level is given, and {problem.sigma_y.min():.2g} is assumed")
    return causes


def _of_range(problem: Problem, pairs: list, image: int) -> Iterator[str]:
    white = parts(problem.A(torch.ones_like(problem.adjoint)))
    for (a, y), of_white in zip(pairs, white, strict=True):
        if y.is_complex():
            continue
        top = of_white.abs().max()
        if message := too_bright(y[image], of_white, problem.sigma_y):
            yield message
        elif bool((of_white >= 0).all()) and bool((y[image] < -0.3 * top).float().mean() > 0.01):
            yield f"y is negative, down to {y[image].min():.2g}: images in [-1, 1] must be moved to [0, 1]"
        else:
            gain = ((y[image] * a[image]).sum() / a[image].square().sum()).item()
            if 0.2 < gain < 0.93 or 1.07 < gain < 5:
                yield f"y is {gain:.2g} times as bright as the samples are for the operator"


def _is_at_the_borders(problem: Problem, pairs: list) -> bool:
    for a, y in pairs:
        if y.ndim != 4 or min(y.shape[-2:]) < 24 or y.is_complex() or bool(((a == 0) & (y == 0)).any()):
            continue
        height, width = (n // 16 + 1 for n in y.shape[-2:])
        power = (a - y).square()
        inner = power[..., height:-height, width:-width]
        outer = (power.sum((1, 2, 3)) - inner.sum((1, 2, 3))) / (power[0].numel() - inner[0].numel())
        inner, level = inner.mean((1, 2, 3)), problem.sigma_y.flatten()
        limit = _BORDER_LEVEL**2 * level**2 + _MODEL_ERROR**2
        if bool(((outer > _BORDER_RATIO**2 * inner) & (outer > limit)).any()):
            return True
    return False


def _measurements(problem: Problem, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the operator makes of x, and y, part by part."""
    return list(zip(parts(problem.A(x.expand(problem.shape))), parts(problem.y), strict=True))
