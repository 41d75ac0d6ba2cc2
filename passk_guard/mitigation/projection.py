r"""Project a gradient g: the smallest change after which a step still serves a protected direction p.

    minimise |g' - g|  subject to  <g', p> >= gamma |g| |p|,

the projection onto a half-space, whose solution moves along p alone:

    g' = g + c p,    c = max(0, gamma |g| |p| - <g, p>) / |p|^2.

gamma = 0 is the one-sided step of PCGrad (arXiv 2001.06782) and A-GEM (arXiv 1812.00420).

Guarantee. The constraint has |g| as it was *before*: <g', p> >= gamma |g||p|, and not gamma |g'||p|. The first-order
gain along p is therefore at least gamma |g| |p|, a share gamma of the most that a step of the original length could
bring. With s = cos(g, p) < gamma before, the norm afterwards is |g'| = |g| sqrt(1 + gamma^2 - s^2) and the cosine is

    cos(g', p) = gamma / sqrt(1 + gamma^2 - s^2)  >=  gamma / sqrt(1 + gamma^2),

which is at least gamma for s <= -gamma, and below it by at most the factor 1 / sqrt(1 + gamma^2) (2% at gamma = 0.2,
worst at s = 0) for |s| < gamma.

Noise. p = q + e estimates the gradient q = grad J_1, and the constraint is on p. For noise e independent of g, with
E e = 0, and the reliability rho = |q|^2 / |p|^2, a step of true cosine s = cos(g, q) that is changed keeps

    <g', q> = <g, q> + c |q|^2 = ((1 - rho) s + sqrt(rho) gamma) |g||q|

up to terms in <g, e> and <q, e>, which are small in many dimensions. At s = -0.3 and gamma = 0.2 that is +0.20, -0.01,
-0.22 and -0.28 of |g||q| for |q| / |e| = 10, 1, 0.3 and 0.1. The posterior mean of the change that q itself asks for,
with rho p in the place of q, has the coefficient max(0, gamma |g||q| - <g, p>) / |p|^2. It is nearer to the true
projection on average, and protects less (benchmarks/README.md, Noise in the protected direction).

Held. Where a loss L is lowered and J_1 is to keep its level, the Lagrangian L - mu J_1 has the gradient g + mu p, with
mu >= 0. `plan_held` takes mu = lambda |g| / |p|, so that lambda, which `HoldController` sets, is the length of what is
added as a share of |g|: a loss has any unit, and the gains of the controller have one. It is the projection with
gamma = s + lambda, the smallest change with <g', p> >= <g, p> + lambda |g||p|. gamma = lambda would not do: lambda = 0
would change every step with s < 0, so that a surplus of J_1 is never released, and s > lambda would add nothing where
J_1 is short. To first order J_1 stands still at lambda = -cos(g, q) / sqrt(rho): noise in p asks for a larger lambda,
which the measured change of J_1 brings about, where it makes a fixed gamma protect less.

Alternative. The constraint cos(g', p) >= gamma projects onto a circular cone. With e the unit vector of the part of g
orthogonal to p, the solution is <g, u> u with u = gamma p / |p| + sqrt(1 - gamma^2) e, and 0 once
s <= -sqrt(1 - gamma^2). It shortens the part of g that no conflict concerns, and stops training where the conflict is
strongest. The half-space keeps that part unchanged and never shrinks |g'| below gamma |g|. torchjd's PCD with
tau = gamma takes the direction of this g' and gives it the length |g|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ProjectionResult:
    """One step of the projection.

    Attributes:
        coefficient: c of g' = g + c p; 0.0 where g stays unchanged.
        keeps: what g is multiplied by in that sum; below 1 in `plan_held` alone.
        cosine_before, cosine_after: cos(g, p) and cos(g', p); None where undefined.
        norm_before, norm_after: |g| and |g'|, the latter by the formula. Not finite when |g| is not.
        reason: why there is no answer and g stays unchanged; None when there is one.
    """

    coefficient: float
    cosine_before: float | None
    cosine_after: float | None
    norm_before: float
    norm_after: float
    reason: str | None = None
    keeps: float = 1.0


def projection_coefficient(inner: float, norm_g_sq: float, norm_p_sq: float, gamma: float = 0.2) -> float:
    """c = max(0, gamma |g||p| - <g,p>) / |p|^2, and 0.0 where the three numbers give no answer.

    Args:
        inner: <g, p> over the whole parameter space, all ranks together.
        norm_g_sq: |g|^2.
        norm_p_sq: |p|^2.
        gamma: in [0, 1).

    Raises:
        GuardError: gamma is outside [0, 1).
    """
    return plan_projection(inner, norm_g_sq, norm_p_sq, gamma).coefficient


def plan_projection(inner: float, norm_g_sq: float, norm_p_sq: float, gamma: float = 0.2) -> ProjectionResult:
    """The projection from its three scalars; arguments and errors as in `projection_coefficient`.

    c scales with |g| / |p|: for a g that comes multiplied by a loss scale it is the coefficient of that g.
    """
    given = {"gamma": gamma, "inner": inner, "norm_g_sq": norm_g_sq, "norm_p_sq": norm_p_sq}
    gamma, inner, norm_g_sq, norm_p_sq = (as_real(value, name) for name, value in given.items())
    if not 0.0 <= gamma < 1.0:
        raise GuardError(f"Expected `gamma` in [0, 1); found {gamma}. The usual value is 0.2.")
    return _plan(inner, norm_g_sq, norm_p_sq, lambda cosine: gamma - cosine)


def plan_held(inner: float, norm_g_sq: float, norm_p_sq: float, multiplier: float) -> ProjectionResult:
    """g' = g + lambda (|g| / |p|) p, with the `multiplier` lambda of `HoldController`, from the same three scalars.

    The sum is divided by lambda where it is above 1, as that of advantages is (`passk_advantages`): a large one turns
    the step and does not make it longer.

    Raises:
        GuardError: a multiplier that is negative or not finite.
    """
    given = {"multiplier": multiplier, "inner": inner, "norm_g_sq": norm_g_sq, "norm_p_sq": norm_p_sq}
    multiplier, inner, norm_g_sq, norm_p_sq = (as_real(value, name) for name, value in given.items())
    if not 0.0 <= multiplier < math.inf:
        raise GuardError(f"Expected `multiplier` >= 0 and finite; found {multiplier}.")
    plan, longest = _plan(inner, norm_g_sq, norm_p_sq, lambda cosine: multiplier), max(1.0, multiplier)
    if not plan.coefficient:
        return plan
    return replace(
        plan, coefficient=plan.coefficient / longest, norm_after=plan.norm_after / longest, keeps=1 / longest
    )


def _plan(inner: float, norm_g_sq: float, norm_p_sq: float, share: Callable[[float], float]) -> ProjectionResult:
    """g' = g + a (|g| / |p|) p with the a >= 0 that `share` gives for cos(g, p)."""
    reason = _no_answer(inner, norm_g_sq, norm_p_sq)
    norm_g = math.sqrt(norm_g_sq) if norm_g_sq >= 0.0 else math.nan
    if reason is not None:
        return ProjectionResult(0.0, None, None, norm_g, norm_g, reason)
    norm_p = math.sqrt(norm_p_sq)
    cosine = max(-1.0, min(1.0, inner / norm_g / norm_p))
    added = share(cosine)
    if added <= 0.0:
        return ProjectionResult(0.0, cosine, cosine, norm_g, norm_g)
    coefficient = added * (norm_g / norm_p)
    if not _SMALLEST <= coefficient <= _LARGEST:  # the sum would take it for infinite or for zero
        reason = f"the coefficient {'over' if coefficient > 1 else 'under'}flows float32"
        return ProjectionResult(0.0, cosine, cosine, norm_g, norm_g, reason)
    growth = math.sqrt(max(0.0, 1.0 + added * (2.0 * cosine + added)))
    after = (cosine + added) / growth if growth > 0.0 else None  # opposite vectors of one length: nothing is left
    return ProjectionResult(coefficient, cosine, after, norm_g, norm_g * growth)


def project_gradient(grads: Sequence[Tensor], protected: Sequence[Tensor], gamma: float = 0.2) -> ProjectionResult:
    """Project g in place, g <- g + c p, in a hand-written loop: between the backward pass and clipping.

    Args:
        grads: g, tensors of any shapes, averaged over ranks (as DistributedDataParallel leaves them), all of them on
            each rank. Sharded gradients: sum the inner products over ranks and call `projection_coefficient`.
        protected: p, the same shapes.
        gamma: in [0, 1).

    Raises:
        GuardError: gamma is outside [0, 1), or the two lists do not match; nothing has been changed.
    """
    _check_match(grads, protected)
    result = plan_projection(_dot(grads, protected), _dot(grads, grads), _dot(protected, protected), gamma)
    if result.coefficient != 0.0:
        with torch.no_grad():
            for g, p in zip(grads, protected, strict=True):
                g.add_(p.to(g.device), alpha=result.coefficient)
    return result


def _no_answer(inner: float, norm_g_sq: float, norm_p_sq: float) -> str | None:
    """Why these three numbers do not determine a coefficient."""
    for name, value in (("<g, p>", inner), ("|g|^2", norm_g_sq), ("|p|^2", norm_p_sq)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    for name, value in (("gradient", norm_g_sq), ("protected direction", norm_p_sq)):
        if value <= 0.0:
            return f"the {name} is zero" if value == 0.0 else f"the squared norm of the {name} is {value}"
    if abs(inner) > 1.01 * math.sqrt(norm_g_sq) * math.sqrt(norm_p_sq):
        return "<g, p> exceeds |g||p|: these are not the squared norms of the same two vectors"
    return None


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product in float64."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        total += float(torch.dot(a.detach().reshape(-1).double(), b.detach().to(a.device).reshape(-1).double()))
    return total


def _check_match(grads: Sequence[Tensor], protected: Sequence[Tensor]) -> None:
    for name, given in (("grads", grads), ("protected", protected)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise GuardError(f"Expected `{name}` to be a list of tensors; found {brief(given)}.")
    if len(grads) != len(protected):
        raise GuardError(f"Expected `protected` as long as `grads`; found {len(protected)} and {len(grads)}.")
    for i, (g, p) in enumerate(zip(grads, protected, strict=True)):
        for part in (g, p):
            if not isinstance(part, Tensor) or not part.is_floating_point():
                raise GuardError(
                    f"Expected tensors of floating dtypes; found {brief(part)} at {i}. Leave a parameter without a "
                    "gradient (None) out of both lists."
                )
        if g.shape != p.shape:
            raise GuardError(
                f"Expected equal shapes; found {tuple(g.shape)} in `grads` and {tuple(p.shape)} in `protected` at {i}. "
                "List both in the order of the same parameters."
            )
