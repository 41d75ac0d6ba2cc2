"""Objectives E[u(p)] with a concave utility u of the pass rate; the prompt weight is u'(p)."""

from __future__ import annotations

import math

from torch import Tensor

from passk_guard.objectives.weighting import Weighting, centred, check_finite, shortest
from passk_guard.utils.errors import GuardError

_LARGEST_BETA = 700.0  # exp of more overflows float64


def maxrl() -> Weighting:
    r"""Maximum Likelihood RL: u = log p, estimated by dividing by the number of successes in place of the samples.

    $A = (r - \bar r) / \bar r$, and 0 for a group without a success. Population weight 1/p. n samples give the
    series for log p cut off at order n - 1, *not* n: $W_n(p) = (1 - (1-p)^{n-1}) / p = \sum_{k<n} (1-p)^{k-1}$, at
    most n - 1. (The estimator without the baseline, $r / \bar r$, reaches order n; a mean-reward baseline that is
    dropped together with the groups that failed takes one order off.)
    Source: arXiv 2602.02710: the estimators are in its method section, the order n - 1 of the one with the baseline
    in an appendix of its third version. The authors' code adds 1e-6 to the divisor, which is left out here.
    """
    return centred("maxrl", lambda n, c: n / c, lambda p: 1 / p)


def rs_grpo(beta: float) -> Weighting:
    r"""RS-GRPO: risk-seeking for beta > 0, $u = \frac{1}{\beta} \log E[e^{\beta r}] = \frac{1}{\beta} \log(1 + pB)$.

    $A = \frac{1}{\beta} (e^{\beta r} / \overline{e^{\beta r}} - 1)$ with the mean over the group. With
    $B = e^\beta - 1$ this is $\frac{B}{\beta} (r - \bar r) / (1 + \bar r B)$, without any standard deviation despite
    the name. Population weight $\frac{B}{\beta (1 + pB)}$, from B/beta at p = 0 to $(1 - e^{-\beta})/\beta$ at
    p = 1. beta -> 0 is Dr. GRPO; as beta grows, beta times the weight tends to MaxRL's 1/p.
    Source: arXiv 2509.24261 (objective and advantage as in the authors' repository Jackory/RS-GRPO, which
    recommends beta = 2).

    Args:
        beta: not 0, of size 700 at most; negative is risk-averse.

    Raises:
        GuardError: beta = 0, not finite, or larger.
    """
    check_finite("beta", beta)
    if beta == 0:
        raise GuardError("Expected `beta` other than 0; found 0. That limit is `dr_grpo`.")
    if abs(beta) > _LARGEST_BETA:
        raise GuardError(f"Expected `beta` within +-{_LARGEST_BETA:g}; found {beta}. The large limit is `maxrl`.")
    lift = math.expm1(beta)

    def weight(p: Tensor) -> Tensor:
        return lift / beta / (1 + p * lift)

    return centred(f"rs_grpo:beta={shortest(beta)}", lambda n, c: weight(c / n), weight)
