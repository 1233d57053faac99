"""The proxies: what each of them says a layer's criticality is, and what it is computed from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from layercrit.errors import ProtocolError, near

__all__ = ["NULLS", "PROXIES", "Proxy", "get_proxy"]

Array = npt.NDArray[np.float64]
Part = Literal["forward", "backward", "outputs", "curvature"]


@dataclass(frozen=True)
class Proxy:
    """A cheap stand-in for the criticality of a layer.

    Attributes:
        name: its column.
        label: its name in tables and figures.
        formula: what it is, in words.
        axes: of what it is the mean: ``draws`` (and images), ``images``, or ``layers`` (no mean: one value a layer).
        absolute: whether the mean over images is taken without its sign.
        null: whether it knows nothing of what the network does: a proxy that ranks no better is of no use.
        parts: which passes it needs.
    """

    name: str
    label: str
    formula: str
    axes: Literal["draws", "images", "layers"]
    absolute: bool = False
    null: bool = False
    parts: tuple[Part, ...] = ()

    def value(self, samples: Array, images: Array | None = None, draws: Array | None = None) -> Array:
        """Return the value of each layer.

        Args:
            samples: ``(n_layers, n_draws, n_images)``, ``(n_layers, n_images)`` or ``(n_layers,)``, as ``axes`` says.
            images: weights of the images in several resamples, ``(n_resamples, n_images)``; None: all count the same.
            draws: weights of the draws, ``(n_resamples, n_draws)``.

        Returns:
            ``(n_layers,)``, or of resamples ``(n_resamples, n_layers)``.
        """
        if self.axes == "layers" or images is None:
            means = samples if self.axes == "layers" else samples.mean(axis=-1)
            means = np.abs(means) if self.absolute else means
            return means.mean(axis=-1) if self.axes == "draws" else means
        shares = _shares(images).T  # layer by layer, so that layers that are alike stay so to the last bit
        means = np.moveaxis(
            np.stack([layer @ shares for layer in samples]), -1, 0
        )  # (n_resamples, n_layers[, n_draws])
        means = np.abs(means) if self.absolute else means
        if self.axes == "images" or draws is None:
            return means if self.axes == "images" else means.mean(axis=-1)
        of_draws: Array = np.einsum("bld,bd->bl", means, _shares(draws))
        return of_draws


def _shares(weights: Array) -> Array:
    shares: Array = weights / weights.sum(axis=1, keepdims=True)
    return shares


_ALL = (
    Proxy(
        "fisher",
        "output change, Fisher",
        "mean over images of the sum over the layer's output units of g² (Y' - Y)²",
        "draws",
        parts=("forward", "backward", "outputs"),
    ),
    Proxy(
        "first_order",
        "output change, first order",
        "size of the mean over images of the sum over output units of g (Y' - Y)",
        "draws",
        absolute=True,
        parts=("forward", "backward", "outputs"),
    ),
    Proxy(
        "gauss_newton",
        "second order, Fisher",
        "half the mean over images of the squared sum over output units of g (Y' - Y): the second order with the "
        "Fisher matrix in place of the Hessian",
        "draws",
        parts=("forward", "backward", "outputs"),
    ),
    Proxy(
        "second_order",
        "second order of the reset",
        "1/2 DᵀHD, with D the change of the parameters and H the Hessian of the loss",
        "images",
        parts=("curvature",),
    ),
    Proxy(
        "obd",
        "empirical Fisher (OBD)",
        "half the sum over parameters of theta² times the mean over images of g² (LeCun, Denker & Solla 1989)",
        "images",
        parts=("forward", "backward"),
    ),
    Proxy(
        "taylor",
        "Taylor",
        "size of the sum over parameters of theta g (Molchanov et al. 2019, arXiv 1906.10771)",
        "images",
        absolute=True,
        parts=("forward", "backward"),
    ),
    Proxy(
        "snip",
        "SNIP",
        "sum over parameters of the size of theta g (Lee et al. 2019, arXiv 1810.02340)",
        "layers",
        parts=("forward", "backward"),
    ),
    Proxy(
        "relative_gradient",
        "relative gradient",
        "norm of g over norm of theta (Lee et al. 2023, arXiv 2210.11466)",
        "layers",
        parts=("forward", "backward"),
    ),
    Proxy(
        "worst_case",
        "worst case, first order",
        "radius times norm of theta times norm of g",
        "layers",
        parts=("forward", "backward"),
    ),
    Proxy(
        "block_influence",
        "block influence",
        "1 - mean cosine of input and output of the block that the layer lies in (Men et al. 2024, arXiv 2403.03853)",
        "images",
        parts=("forward",),
    ),
    Proxy(
        "distance",
        "distance from the start",
        "norm of trained minus initial parameters, over the square root of their number",
        "layers",
    ),
    Proxy("log_parameters", "log parameters", "logarithm of the number of parameters", "layers", null=True),
    Proxy("depth", "depth", "place in the order in which the network uses its layers", "layers", null=True),
    Proxy("weight_norm", "weight norm", "Euclidean norm of the trained parameters", "layers", null=True),
)

PROXIES: Mapping[str, Proxy] = {proxy.name: proxy for proxy in _ALL}
"""All proxies by name, in the order of tables; the nulls come last."""

NULLS = tuple(proxy.name for proxy in _ALL if proxy.null)


def get_proxy(name: str) -> Proxy:
    """Return the proxy of a name.

    Raises:
        ProtocolError: there is none.
    """
    if name not in PROXIES:
        raise ProtocolError(f"There is no proxy {name!r}. {near(name, PROXIES)}")
    return PROXIES[name]
