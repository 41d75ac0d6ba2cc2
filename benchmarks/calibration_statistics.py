"""The statistics that the calibration compares, many repetitions at once, from gradients rather than Gram matrices.

Each gives estimates [R, 3] of <grad J_k, grad J_1>, |grad J_1|^2 and |grad J_k|^2, the change [R, m, 3] of each when a
prompt is left out, and the shares [m, R, 3, 3] of the prompts in the overshoot of the jackknife. `guard` is the
product's, computed another way (sums of vectors in place of Gram matrices), which a test holds against
`passk_guard.estimation.ustatistics`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.estimation.evidence import Check
from passk_guard.estimation.ustatistics import Moments, jackknife_overshoot
from passk_guard.passk.closed_forms import sample_coefficients


@dataclass(frozen=True)
class Draw:
    """R repetitions of a refresh with m prompts and n samples each, kept in two halves of n/2.

    Attributes:
        correct: [2, R, m] right samples of each half, int64.
        positive, negative: [2, R, m, d] sums of the score vectors of right and of wrong samples.
        half: n/2.
        named: prompts in a row that the statistic is told to be one cluster.
    """

    correct: Tensor
    positive: Tensor
    negative: Tensor
    half: int
    named: int = 1

    def gradient(self, k: int) -> Tensor:
        """[R, m, d] the leave-one-out gradient of pass@k from all samples of each prompt."""
        return _leave_one_out(self.correct.sum(0), 2 * self.half, k, self.positive.sum(0), self.negative.sum(0))

    def half_gradient(self, which: int, k: int) -> Tensor:
        """[R, m, d] the same from one half of the samples; k <= n/2."""
        return _leave_one_out(self.correct[which], self.half, k, self.positive[which], self.negative[which])


def _leave_one_out(correct: Tensor, n: int, k: int, positive: Tensor, negative: Tensor) -> Tensor:
    right, wrong = sample_coefficients(torch.full_like(correct, n), correct, torch.tensor(k))
    return right[..., None] * positive + wrong[..., None] * negative


def guard(draw: Draw, k: int) -> Moments:
    """Means over pairs of different clusters, with the jackknife's overshoot taken off: the product's.

    Pairs of clusters of equal size are pairs of their mean gradients.
    """
    one, many = (draw.gradient(kk).unflatten(1, (-1, draw.named)).mean(2) for kk in (1, k))
    mixed = many @ one.mT
    kernels = torch.stack([(mixed + mixed.mT) / 2, one @ one.mT, many @ many.mT], 1)
    overshoot = torch.stack([jackknife_overshoot(kernel) for kernel in kernels], 1)
    return _join(_different(many, one), _different(one, one), _different(many, many), overshoot=overshoot)


def plain_jackknife(draw: Draw, k: int) -> Moments:
    """The same with the jackknife as it is."""
    one, many = draw.gradient(1), draw.gradient(k)
    return _join(_different(many, one), _different(one, one), _different(many, many))


def naive(draw: Draw, k: int) -> Moments:
    """The plain cosine of two averages: all pairs, same-prompt ones included."""
    one, many = draw.gradient(1), draw.gradient(k)
    return _join(_all(many, one), _all(one, one), _all(many, many))


def plug_in(draw: Draw, k: int) -> Moments:
    """Different prompts, with w_k at the observed pass rate c/n in place of leave-one-out weights."""
    one = draw.gradient(1)
    rate = draw.correct.sum(0).double() / (2 * draw.half)
    many = (k * (1 - rate) ** (k - 1))[..., None] * one
    return _join(_different(many, one), _different(one, one), _different(many, many))


def sample_splitting(draw: Draw, k: int) -> Moments:
    """All pairs, the two gradients of a pair from different halves of the samples; needs k <= n/2."""
    one = [draw.half_gradient(i, 1) for i in (0, 1)]
    many = [draw.half_gradient(i, k) for i in (0, 1)]
    return _join(_all(many[0], one[1]), _all(one[0], one[1]), _all(many[0], many[1]))


def _different(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m, (a, b) = left.shape[1], (left.sum(1, keepdim=True), right.sum(1, keepdim=True))
    same = (left * right).sum(-1)
    total = (a * b).sum(-1) - same.sum(1, keepdim=True)
    without = total - (left * (b - right)).sum(-1) - (right * (a - left)).sum(-1)
    value = total / (m * (m - 1))
    return value[:, 0], without / ((m - 1) * (m - 2)) - value, same / (m * (m - 1))


def _all(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m, (a, b) = left.shape[1], (left.sum(1, keepdim=True), right.sum(1, keepdim=True))
    value = (a * b).sum(-1) / m**2
    return value[:, 0], ((a - left) * (b - right)).sum(-1) / (m - 1) ** 2 - value, (left * right).sum(-1) / m**2


def _join(*parts: tuple[Tensor, Tensor, Tensor], overshoot: Tensor | None = None) -> Moments:
    """Repetitions stand where the product has its values of k."""
    value = torch.stack([part[0] for part in parts], -1)
    change, own = (torch.stack([part[i] for part in parts], -1).transpose(0, 1) for i in (1, 2))
    none = value.new_zeros(len(change), len(value), 3, 3)
    return Moments(value, change, value, own, lambda: none if overshoot is None else overshoot)


def checks_of(moments: Moments) -> Iterator[Check]:
    """What each repetition says of a conflict, as `conflict_check` would of a refresh."""
    for row in zip(-moments.value[:, 0], moments.covariance[:, 0, 0], moments.degrees, strict=True):
        yield Check(*(float(x) for x in row))


def pool(parts: list[Moments]) -> Moments:
    """Refreshes of equally many fresh prompts, averaged; every prompt is left out of its own."""
    share = 1 / len(parts)
    value = share * torch.stack([part.value for part in parts]).sum(0)
    change, own = (torch.cat([share * getattr(part, name) for part in parts]) for name in ("influence", "sizes"))
    return Moments(value, change, value, own, lambda: share**2 * torch.cat([part.overshoots for part in parts]))


STATISTICS = {
    "guard": guard,
    "plain jackknife": plain_jackknife,
    "plug-in weights": plug_in,
    "sample splitting": sample_splitting,
    "naive": naive,
}
