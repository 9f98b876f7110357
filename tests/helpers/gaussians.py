"""Gaussians in one dimension, whose velocity fields are exact, for the closed forms of methods."""

from collections.abc import Callable, Sequence

from torch import Tensor

from distill.philox import Draw


def gaussian_field(mean: float | Tensor, std: float | Tensor) -> Callable[..., Tensor]:
    """The marginal velocity E[eps - x_0 | x_t] of data N(mean, std^2)."""

    def velocity(x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        t = t.view(-1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        offset = x_t - (1 - t) * mean
        return (t - (1 - t) * std**2) / variance * offset - mean

    return velocity


def affine_student(mean: float | Tensor, std: float | Tensor) -> Callable[..., Tensor]:
    """The velocity whose one step makes mean + std z of noise z."""
    return lambda z, t, cond=None: z - (mean + std * z)


class FixedDraw(Draw):
    """Times and noise that were drawn before."""

    def __init__(self, t: Tensor, eps: Tensor) -> None:
        self._t, self._eps = t, eps

    def uniform(self) -> Tensor:
        return self._t

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._eps
