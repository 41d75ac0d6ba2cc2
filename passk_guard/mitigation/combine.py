"""Two-objective methods of torchjd: weights from a Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.text import brief

Weighting = Callable[[Tensor], Tensor]

METHODS = {
    "mgda": "MGDAWeighting",
    "imtl-g": "IMTLGWeighting",
    "aligned-mtl": "AlignedMTLWeighting",
    "pcd": "PCDWeighting",
}
"""Name here -> class in torchjd.aggregation."""


def combine(gramian: Tensor, method: str | Weighting) -> Tensor:
    """Weights w of the combined gradient w_0 g + w_1 p, where row 0 is the training and row 1 the protected gradient.

    - "mgda": the shortest vector of the convex hull (Désidéri 2012; Sener and Koltun, arXiv 1810.04650).
    - "imtl-g": equal projections onto both unit gradients (Liu et al., ICLR 2021); zero where they are opposite.
    - "aligned-mtl": both gradients made orthogonal and equally long (Senushkin et al., arXiv 2305.19000).
    - "pcd": g with a share of progress assured along p. torchjd's weighting keeps a moving average of the squared
      norms, and a name starts it afresh on every call: pass your own `PCDWeighting()` to keep it.

    PCGrad is not offered: torchjd's changes the protected gradient as well, uses the global random generator of the
    training, and gives the weights [1, 1] for NaN. For its one-sided step call `project_gradient(..., gamma=0.0)`.

    Args:
        gramian: [2, 2] inner products [[<g,g>, <g,p>], [<g,p>, <p,p>]], in any floating dtype.
        method: a name, or your own torchjd weighting, called with `gramian` in float64 as it is. For a name the
            matrix is scaled to trace 2 first: no method depends on the scale, but torchjd's tolerances do.

    Returns:
        [2] float64 on the device of `gramian`.

    Raises:
        GuardError: an unknown method, torchjd not installed, or a matrix of another shape.
        FailedRefresh: a matrix with NaN or inf, or whose diagonal is not positive; or weights that are not finite.
    """
    if not isinstance(gramian, Tensor) or gramian.is_complex() or tuple(gramian.shape) != (2, 2):
        found = list(gramian.shape) if isinstance(gramian, Tensor) else type(gramian).__name__
        raise GuardError(f"Expected a real [2, 2] Gram matrix [[gg, gp], [gp, pp]]; found {found}.")
    wide = gramian.detach().double()
    if not bool(torch.isfinite(wide).all()) or not bool((wide.diagonal() > 0).all()) or not _possible(wide):
        raise FailedRefresh(f"no weights follow from the Gram matrix {wide.tolist()}")
    chosen = _weighting(method) if isinstance(method, str) else method
    if not callable(chosen):
        raise GuardError(f"Expected `method` to be a name or a weighting of torchjd; found {brief(method)}.")
    weights = chosen(_of_trace_2(wide) if isinstance(method, str) else wide)
    if not isinstance(weights, Tensor) or weights.shape != (2,):
        raise GuardError(f"Expected a weighting that returns 2 weights; {brief(method)} gave {brief(weights)}.")
    if not bool(torch.isfinite(weights).all()):
        raise FailedRefresh(f"{method} gave the weights {weights.tolist()} for the Gram matrix {wide.tolist()}")
    return weights.detach().to(wide)


def _possible(gramian: Tensor) -> bool:
    """Symmetric, and |<g, p>| <= |g||p|, up to rounding."""
    (gg, gp), (pg, pp) = gramian.tolist()
    length = math.sqrt(gg) * math.sqrt(pp)
    return abs(gp - pg) <= 1e-3 * length and max(abs(gp), abs(pg)) <= 1.001 * length


def _of_trace_2(gramian: Tensor) -> Tensor:
    halved = gramian / gramian.diagonal().max()  # the sum of two large numbers may be infinite
    return halved * (2.0 / halved.trace())


def _weighting(name: str) -> Weighting:
    if name.lower() in ("pcgrad", "pc-grad"):
        raise GuardError(
            "torchjd's PCGrad is not offered: it changes the protected gradient too and uses the global random "
            "generator. For its one-sided step call `project_gradient` with gamma=0.0."
        )
    known = METHODS.get(name.lower().replace("_", "-"))
    if known is None:
        raise GuardError(f"Expected `method` to be one of {', '.join(METHODS)}; found {name!r}.")
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise GuardError(f"Method {name!r} comes from torchjd, which is not installed. pip install torchjd") from error
    weighting: Weighting = getattr(aggregation, known)()
    return weighting
