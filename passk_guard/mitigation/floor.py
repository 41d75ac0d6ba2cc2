r"""The smallest floor under the prompt weights at which the training gradient agrees with pass@1 again.

With the weights clipped from below, $f(W) = \max(W, \varphi)$ (and from above where a cap is set), the expected
gradient is $g_\varphi = E[f(W(x)) \nabla p(x)]$. At $\varphi = 0$ it is grad J_k; at $\varphi = k$ all prompts weigh
the same and it is k grad J_1. In between lies the smallest floor with

    cos(g_phi, grad J_1) >= gamma,

which keeps as much of the emphasis on hard prompts as pass@1 can bear. Everything is computed from the Gram matrices of
the probe, without any gradient.

A sufficient bound: with agreement scores a(x), A+ = E[max(a, 0)] and A- = E[max(-a, 0)], no weights with
w_hi / w_lo <= A+ / A- can conflict (arXiv 2602.21189, Sec. 4). It holds for the worst assignment of weights to prompts
and is therefore far from necessary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from passk_guard.estimation.agreement import agreement_sums
from passk_guard.estimation.gram import checked_probe
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import Moments, cluster_sizes, coefficients, pooled_moments
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError

_GRID = 64  # points besides the weights that occur; between two of them the inner product is linear
_ERROR_FLOOR = 0.2  # added in quadrature to an error, so that no single refresh is taken for certain

FloorStatus = Literal["solved", "not_needed", "no_floor_suffices", "undetermined"]


@dataclass(frozen=True)
class FloorSolution:
    """The floor by one estimate from the probe.

    Attributes:
        status: "solved"; "not_needed" where the cosine reaches gamma without a floor; "no_floor_suffices" where it
            does not below the largest floor allowed; "undetermined" where the probe holds no pass@1 signal.
        reason: one sentence, for the last two.
        floor: the smallest floor, in units of w_k (a prompt that pass@1 trains on has weight 1); 0.0 where none is
            needed, None where there is no answer.
        standard_error: jackknife over prompts, of `floor`; None where there is none.
        weight_ratio_bound: A+ / A- of the newest refresh, the w_hi / w_lo below which no conflict is possible. Noise
            in the agreement scores pulls it towards 1, to the safe side. None without a negative score.
    """

    status: FloorStatus
    reason: str = ""
    floor: float | None = None
    standard_error: float | None = None
    weight_ratio_bound: float | None = None


@dataclass(frozen=True)
class FloorState:
    """The floor in force and how much is known about it.

    Attributes:
        floor: in units of w_k; 0.0 before the first answer.
        precision: discounted sum of the inverse variances of the answers so far.
    """

    floor: float = 0.0
    precision: float = 0.0


def solve_floor(
    probes: Sequence[ProbeGram],
    k: int,
    *,
    gamma: float = 0.0,
    largest: float = 1.0,
    cap: float | None = None,
) -> FloorSolution:
    r"""Solve the smallest floor at which the U-statistic cosine of g_phi and g_1 reaches gamma.

    The U-statistics are pooled over refreshes first and solved once. Each coefficient is piecewise linear in the
    floor, with a knot at every weight that n samples can give. On a grid of these knots and 64 points more the root
    is found by linear interpolation, exactly for gamma = 0. The roots with each prompt left out give the jackknife.

    Args:
        probes: refreshes to pool, newest last, each of at least 3 prompts with n >= k.
        k: of pass@k.
        gamma: cosine to reach, in [0, 1).
        largest: largest floor allowed, in (0, k].
        cap: of the weights, where there is one; the floor stays below it.

    Raises:
        GuardError: no refresh, an invalid probe (`checked_probe`), or gamma, largest or cap outside their bounds.
    """
    gamma, largest = as_real(gamma, "gamma"), as_real(largest, "largest")
    cap = None if cap is None else as_real(cap, "cap")
    _check(probes, k, gamma, largest, cap)
    probes = [checked_probe(probe, k) for probe in probes]
    largest = min(largest, cap) if cap is not None else largest
    if min(len(cluster_sizes(p)) for p in probes) < 3:
        return FloorSolution("undetermined", "fewer than 3 prompts, or clusters of prompts")
    bound = _weight_ratio_bound(probes[-1])
    grid = _grid(probes, k, largest)
    moments = pooled_moments(probes, lambda probe: coefficients(probe, torch.tensor([k]), floor=grid[:, None], cap=cap))
    if not float(moments.value[0, 1]) > 0:
        norm_sq = float(moments.value[0, 1])
        reason = f"the probe holds no pass@1 signal: |grad J_1|^2 = {norm_sq:.2g}"
        return FloorSolution("undetermined", reason, weight_ratio_bound=bound)
    floor = float(_first_root(_constraint(moments.value[None], gamma), grid)[0])
    if math.isnan(floor):
        reason = f"no floor up to {largest:g} brings the cosine to {gamma:g}"
        return FloorSolution("no_floor_suffices", reason, weight_ratio_bound=bound)
    error = _jackknife_error(moments, gamma, grid)
    return FloorSolution("solved" if floor > 0 else "not_needed", "", floor, error, bound)


def smooth_floor(
    state: FloorState, solution: FloorSolution, average: float, *, caution: float = 1.0, largest: float = math.inf
) -> FloorState:
    r"""Average the solved floors, each weighted by its precision.

    $P_t = a P_{t-1} + 1/(s_t^2 + 0.2^2)$ and $\varphi_t$ moves towards $\hat\varphi_t + z s_t$ by the share of the new
    precision in $P_t$, with s the jackknife error: a noisy solution moves the floor little. The solution is raised by
    z errors, since a floor that is too low costs pass@1 and one that is too high costs little pass@k. Without the
    average the floor would be dropped as soon as the angle is acute, which it is after the damage. Solutions without
    a floor change nothing.

    Args:
        state: before.
        solution: of `solve_floor`.
        average: a in [0, 1); 0 takes each solution as it is.
        caution: z >= 0.
        largest: above which no solution is raised.

    Raises:
        GuardError: average or caution outside its bounds.
    """
    average, caution = as_real(average, "average"), as_real(caution, "caution")
    if not 0 <= average < 1:
        raise GuardError(f"Expected `average` in [0, 1); found {average}. The usual value is 0.8.")
    if not 0 <= caution < math.inf:
        raise GuardError(f"Expected a finite `caution` >= 0; found {caution}.")
    if solution.floor is None:
        return state
    error = solution.standard_error or 0.0
    answer = min(solution.floor + caution * error, max(largest, solution.floor))
    old, new = average * state.precision, 1 / (error**2 + _ERROR_FLOOR**2)
    return FloorState((old * state.floor + new * answer) / (old + new), old + new)


def _check(probes: Sequence[ProbeGram], k: int, gamma: float, largest: float, cap: float | None) -> None:
    if not probes:
        raise GuardError("Expected at least one refresh to solve a floor from; found none.")
    if not 0.0 <= gamma < 1.0:
        raise GuardError(f"Expected `gamma` in [0, 1); found {gamma}.")
    if not 0.0 < largest <= k:
        raise GuardError(f"Expected 0 < `largest` <= k = {k}; found {largest}: at k all prompts weigh the same.")
    if cap is not None and not cap > 0:
        raise GuardError(f"Expected `cap` > 0; found {cap}.")


def _grid(probes: Sequence[ProbeGram], k: int, largest: float) -> Tensor:
    """[F] floors, ascending from 0 to `largest`: the weights that the samples can give, and points in between."""
    counts = torch.cat([p.num_samples for p in probes]).unique().tolist()
    knots = [k * math.comb(n - 1 - c, k - 1) / math.comb(n - 1, k - 1) for n in counts for c in range(n)]
    even = torch.linspace(0.0, largest, _GRID + 1, dtype=torch.float64)
    return torch.cat([even, torch.tensor([w for w in knots if 0 < w < largest], dtype=torch.float64)]).unique()


def _constraint(values: Tensor, gamma: float) -> Tensor:
    """[N, F] of U_phi1 - gamma sqrt(U_11 U_phiphi), from [N, F, 3]; negative where the cosine is below gamma."""
    norms = (values[..., 1].clamp(min=0) * values[..., 2].clamp(min=0)).sqrt()
    return values[..., 0] - gamma * norms


def _first_root(constraint: Tensor, grid: Tensor) -> Tensor:
    """[N] smallest floor at which the constraint is not negative; NaN where there is none."""
    enough = constraint >= 0
    at = enough.int().argmax(1)
    before = (at - 1).clamp(min=0)
    pick = torch.arange(len(constraint))
    low, high = constraint[pick, before], constraint[pick, at]
    share = torch.where(at > 0, low / (low - high), 0.0)
    root = grid[before] + share * (grid[at] - grid[before])
    return torch.where(enough.any(1), root, torch.nan)


def _jackknife_error(moments: Moments, gamma: float, grid: Tensor) -> float:
    """Of the root over prompts left out; one without a root counts as the largest floor."""
    roots = _first_root(_constraint(moments.value + moments.influence, gamma), grid).nan_to_num(float(grid[-1]))
    count = len(roots)
    return math.sqrt((count - 1) / count * float(((roots - roots.mean()) ** 2).sum()))


def _weight_ratio_bound(probe: ProbeGram) -> float | None:
    agreement = agreement_sums(probe)
    positive, negative = float(agreement.clamp(min=0).sum()), float((-agreement).clamp(min=0).sum())
    return positive / negative if negative > 0 else None
