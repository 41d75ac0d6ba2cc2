r"""What a refresh shows of the noise of its own statistic, in parts that say what another size of probe would have.

By Hoeffding (1948) a U-statistic of m prompts with kernel $\theta + h_1(x) + h_1(y) + h_2(x, y)$ has the variance
$4 \zeta_1/m + 2 \zeta_2/(m(m-1))$, $\zeta_i = Var(h_i)$. Both are known without bias from what the estimate computes
anyway: the jackknife expects $4 \zeta_1/m + 4 \zeta_2/(m(m-2))$ and its overshoot is a known multiple of $\zeta_2$
(see `degenerate`). Needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import passk_rows, refresh_moments
from passk_guard.utils.errors import GuardError

_FEWEST_PROMPTS = 4  # below, nothing is left to tell the two parts apart


@dataclass(frozen=True)
class Noise:
    """Signal and noise of U_k1, U_11, U_kk, in that order, on average over refreshes with prompts of their own.

    Attributes:
        prompts: m of a refresh. refreshes: how many are averaged.
        value: [3] float64, estimates of <grad J_k, grad J_1>, |grad J_1|^2, |grad J_k|^2.
        linear, degenerate: [3, 3] float64, unbiased estimates of zeta_1 and zeta_2; `linear` may be indefinite.
        degrees: of freedom of the variance of U_k1 in one refresh, see `Moments.degrees`.
        solved, failed: share of prompts whose samples are all right, or all wrong: they have no gradient.
    """

    prompts: float
    refreshes: int
    value: Tensor
    linear: Tensor
    degenerate: Tensor
    degrees: float
    solved: float
    failed: float

    def variance(self, slope: Tensor, prompts: float) -> float:
        """Of slope . U in one refresh of this many prompts; neither part of it is taken to be negative."""
        linear, degenerate = (max(0.0, float(slope @ part @ slope)) for part in (self.linear, self.degenerate))
        return 4 * linear / prompts + 2 * degenerate / (prompts * (prompts - 1))

    def error(self, which: int) -> float:
        """Standard error of `value[which]`, all refreshes together."""
        slope = torch.zeros(3, dtype=torch.float64)
        slope[which] = 1
        return math.sqrt(self.variance(slope, self.prompts) / self.refreshes)

    def degrees_at(self, prompts: float) -> float:
        """Degrees of freedom in a refresh of this many prompts: in proportion, in [3, prompts - 1]."""
        return max(3.0, min(self.degrees * prompts / self.prompts, prompts - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; `planning.inputs.read_noise` is the inverse."""
        values = {name: value for name, value in vars(self).items() if name != "refreshes"}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def measure_noise(probe: ProbeGram, k: int) -> Noise | None:
    """The noise of one refresh; None below 4 prompts, where no prompt has a gradient, or for kept samples.

    Args:
        probe: one refresh, checked, with at least k samples of each prompt. Samples of an earlier refresh add no
            evidence, and would count their draw twice.
    """
    m = probe.num_samples.numel()
    known = m >= _FEWEST_PROMPTS and not probe.reused
    moments = refresh_moments(probe, passk_rows(torch.tensor([k]))) if known else None
    if moments is None or not bool(moments.jackknife[0].any()):
        return None
    degenerate = moments.overshoots.sum(0)[0] / (4 / (m * (m - 2)) - 2 / (m * (m - 1)))
    return Noise(
        prompts=m,
        refreshes=1,
        value=moments.value[0],
        linear=m / 4 * (moments.jackknife[0] - 4 / (m * (m - 2)) * degenerate),
        degenerate=degenerate,
        degrees=float(moments.degrees[0]),
        solved=float((probe.num_correct == probe.num_samples).double().mean()),
        failed=float((probe.num_correct == 0).double().mean()),
    )


def average_noise(parts: Sequence[Noise]) -> Noise:
    """The mean of several, each with the weight of its prompts.

    Every part stays unbiased; where gradients grow along a run, the refreshes in which they are large count most.

    Raises:
        GuardError: of none.
    """
    if not parts:
        raise GuardError("Expected the noise of at least one refresh; found none.")
    weights = torch.tensor([part.prompts * part.refreshes for part in parts], dtype=torch.float64)
    weights = weights / weights.sum()

    def mean(name: str) -> Any:
        values = torch.stack([torch.as_tensor(getattr(part, name), dtype=torch.float64) for part in parts])
        found = torch.tensordot(weights, values, dims=1)
        return found if found.ndim else float(found)

    return Noise(
        refreshes=sum(part.refreshes for part in parts),
        **{field.name: mean(field.name) for field in fields(Noise) if field.name != "refreshes"},
    )
