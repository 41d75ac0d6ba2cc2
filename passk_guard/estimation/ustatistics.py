"""Prompt-level U-statistics of gradient inner products, from one Gram matrix. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.passk import Weighting
from passk_guard.passk.closed_forms import sample_coefficients
from passk_guard.passk.importance import reweighted
from passk_guard.utils.clusters import cluster_sums, numbered
from passk_guard.utils.errors import GuardError

_ROWS = 64
_LARGEST_SHARE = 0.5  # a variance that is all degenerate is counted twice, no other more often
_REUSED = "samples of an earlier policy (`misses`). Pass the refreshes with fresh ones"

Rows = Callable[[ProbeGram], Tensor]
"""Gives the [K, 2m] rows that turn the score sums of a probe with m prompts into K gradients of each prompt."""


@dataclass(frozen=True)
class Moments:
    """U-statistics of one or more refreshes, for K weightings of the prompts at once, such as K values of k.

    The last dimension of 3 holds U_k1, U_11, U_kk: estimates of <grad J_k, grad J_1>, |grad J_1|^2, |grad J_k|^2.

    Attributes:
        value: [K, 3] float64.
        influence: [N, K, 3] change of `value` when each of N clusters is left out; most often one prompt each.
        naive: [K, 3] the same means over all pairs, same-prompt ones included: biased, for comparison.
        sizes: [N, K, 3] each cluster's own inner products, which `value` leaves out, in its units.
        find_overshoot: computes `overshoots`, which takes m^2 operations for each of the K, at the first request.
    """

    value: Tensor
    influence: Tensor
    naive: Tensor
    sizes: Tensor
    find_overshoot: Callable[[], Tensor]

    def at(self, which: int) -> Moments:
        """The same of one of the weightings, K = 1."""
        only = slice(which, which + 1)
        parts = (self.value[only], self.influence[:, only], self.naive[only], self.sizes[:, only])
        return Moments(*parts, lambda: self.overshoots[:, only])

    @cached_property
    def overshoots(self) -> Tensor:
        """[N, K, 3, 3] shares of the prompts in what the jackknife counts twice."""
        return self.find_overshoot()

    @cached_property
    def jackknife(self) -> Tensor:
        """[K, 3, 3] jackknife covariance of `value`: (N - 1)/N times the sum of squared deviations."""
        count, centred = self.influence.shape[0], self._centred
        return (count - 1) / count * torch.einsum("nki,nkj->kij", centred, centred)

    @cached_property
    def covariance(self) -> Tensor:
        """[K, 3, 3] of `value`: the jackknife without the degenerate part it counts twice."""
        return without_overshoot(self.jackknife, self.overshoots.sum(0))

    @cached_property
    def effective_prompts(self) -> Tensor:
        r"""[K, 2] clusters that carry |grad J_1|^2 and |grad J_k|^2: Kish's (sum s)^2 / sum s^2 of their own squares s.

        It does not look at pairs. So it cannot be large just where a sample makes U large.
        """
        own = self.sizes[..., 1:].clamp(min=0)
        own = own / own.amax(0).clamp(min=1e-300)
        return own.sum(0).square() / own.square().sum(0).clamp(min=1e-300)

    @cached_property
    def degrees(self) -> Tensor:
        """[K] degrees of freedom of the variance of U_k1, which is the contrast at a cosine of 0."""
        return self.degrees_at(torch.zeros(len(self.value), dtype=self.value.dtype))

    def degrees_at(self, cosine: Tensor) -> Tensor:
        r"""Degrees of freedom of the variance of $U_{k1} - c \sqrt{U_{11} U_{kk}}$, in [3, N - 1].

        A variance estimate V with a variance Var(V) has $2 V^2 / Var(V)$ of them (Satterthwaite 1946). V is a sum over
        clusters: squared changes, less the share in what the jackknife counts twice. That share is a statistic of
        pairs, and changes twice as much when a cluster is left out. Without it this is 2N / (kurtosis - 1). A few hard
        prompts carry most of grad J_k, so that 64 prompts often give 20 degrees. The effect of a prompt on the changes
        of the others is left out: with it 95% intervals cover 98% (benchmarks/README.md, Calibration).

        Args:
            cosine: [..., K] c, replaced by 0 where a squared norm is not positive.
        """
        count = self.influence.shape[0]
        spread, variance = self._contrast
        powers = torch.stack([torch.ones_like(cosine), cosine, cosine.square()], -1)
        variance = (powers * variance).sum(-1)
        spread = torch.einsum("...ki,kij,...kj->...k", powers, spread, powers)
        found = 2 * variance.square() / (count * spread).clamp(min=1e-300)
        degrees = torch.where(variance > 0, found, count)
        return degrees.clamp(min=3.0).clamp(max=max(1.0, count - 1.0))

    def changes_at(self, cosine: Tensor) -> Tensor:
        r"""[N, K] change of $U_{k1} - c \sqrt{U_{11} U_{kk}}$ when each prompt is left out, less its mean."""
        return (self._centred * self._slope(cosine)).sum(-1)

    def _slope(self, cosine: Tensor) -> Tensor:
        """[K, 3] of that contrast in U_k1, U_11, U_kk."""
        _, one, many = self.value.unbind(-1)
        root = torch.where((one > 0) & (many > 0), cosine * (one * many).clamp(min=0).sqrt() / 2, 0.0)
        return torch.stack([torch.ones_like(one), *(-root / torch.where(root != 0, x, 1.0) for x in (one, many))], -1)

    @cached_property
    def _contrast(self) -> tuple[Tensor, Tensor]:
        """Of the contrast as a polynomial of c, in units of U_k1's error: [K, 3, 3] variance over clusters of what
        each brings to V at powers 0, 1, 2 of c, and [K, 3] V."""
        count = self.influence.shape[0]
        slope = self._slope(torch.ones_like(self.value[:, 0]))
        slope[:, 0] = 0
        slopes = torch.stack([torch.zeros_like(slope), slope], 1)  # [K, 2, 3] of powers 0 and 1
        slopes[:, 0, 0] = 1
        unit = self.covariance[:, 0, 0].clamp(min=0).sqrt()
        slopes = slopes / torch.where(unit > 0, unit, 1.0)[:, None, None]
        change = torch.einsum("nki,kpi->nkp", self._centred, slopes)
        shares = torch.einsum("nkij,kpi,kqj->nkpq", self.overshoots, slopes, slopes)
        parts = (count - 1) / count * change[..., :, None] * change[..., None, :] - 2 * shares
        parts = torch.stack([parts[..., 0, 0], 2 * parts[..., 0, 1], parts[..., 1, 1]], -1)
        parts = parts - parts.mean(0)
        whole = torch.einsum("kij,kpi,kqj->kpq", self.covariance, slopes, slopes)
        variance = torch.stack([whole[:, 0, 0], 2 * whole[:, 0, 1], whole[:, 1, 1]], -1)
        return torch.einsum("nki,nkj->kij", parts, parts) / count, variance

    @cached_property
    def _centred(self) -> Tensor:
        return self.influence - self.influence.mean(0)


def coefficients(probe: ProbeGram, ks: Tensor, *, floor: Tensor | None = None, cap: float | None = None) -> Tensor:
    """[K, 2m] rows that turn the 2m score sums into g_k of each prompt: alpha+ of m prompts, then alpha-.

    With bounds, the prompt weight of g_k is clipped to [floor, cap] as in `sample_coefficients`. `floor` holds [F, 1]
    floors, which give one row each at the one k. Samples of an earlier policy, for which no clipped weight is unbiased,
    have no bounds: GuardError. With fresh samples of another engine, a clipped weight is that of its own pass rate.
    """
    ks = ks.cpu()
    positive, negative = sample_coefficients(probe.num_samples, probe.num_correct, ks[:, None], floor=floor, cap=cap)
    bounded = floor is not None or cap is not None
    if probe.reused and bounded:
        raise GuardError(f"Expected fresh samples for a floor or a cap; found {_REUSED}.")
    if probe.misses is not None and not bounded:
        positive = reweighted(positive, probe.num_samples, probe.num_correct, probe.misses, ks)
    return torch.cat([positive, negative], dim=1)


@dataclass(frozen=True)
class PassKRows:
    """The rows of pass@k, for K values of k."""

    ks: tuple[int, ...]

    def __call__(self, probe: ProbeGram) -> Tensor:
        """[K, 2m]."""
        return coefficients(probe, torch.tensor(self.ks))


def passk_rows(ks: Tensor) -> PassKRows:
    """The rows of pass@k for ks [K]. Moments that are made with them are kept with the probe."""
    return PassKRows(tuple(ks.tolist()))


def weighting_rows(weighting: Weighting) -> Rows:
    """The one row of another objective, as its trainer would weigh these samples; GuardError unless they are fresh."""

    def rows(probe: ProbeGram) -> Tensor:
        if probe.reused:
            raise GuardError(f"Expected fresh samples for `weighting`; found {_REUSED}.")
        return torch.cat(weighting.coefficients(probe.num_samples, probe.num_correct))[None]

    return rows


def prompt_kernel(probe: ProbeGram, left: Tensor, right: Tensor) -> Tensor:
    """[m, m] inner products <g(x), h(x')> where `left` and `right` are [2m] coefficient rows of g and h."""
    kernel = torch.empty(len(left) // 2, len(left) // 2, dtype=torch.float64)
    for rows, products in _products(probe, right):
        kernel[rows] = _times(left, rows, products)
    return kernel


def clusters(probe: ProbeGram) -> Tensor:
    """[m] int64 cluster of each prompt: those of one name in `prompt_keys`, numbered in the order of first sight."""
    m = probe.num_samples.numel()
    return probe.keep("clusters", lambda: numbered(probe.prompt_keys if len(probe.prompt_keys) else range(m)))


def cluster_sizes(probe: ProbeGram) -> Tensor:
    """[C] int64 prompts of each cluster."""
    return probe.keep("cluster sizes", lambda: clusters(probe).bincount())


def other_prompt_sums(probe: ProbeGram, left: Tensor, right: Tensor) -> Tensor:
    """[m] sum over x' of other clusters of <g(x), h(x')>: the kernel's row sums, without the kernel."""
    everything = (left * (probe.gram @ right)).view(2, -1).sum(0)
    return everything - _own_cluster(probe, left[None], right[None])[0]


def _own_cluster(probe: ProbeGram, left: Tensor, right: Tensor) -> Tensor:
    """[K, m] sum over x' of the cluster of x, x included, of <g(x), h(x')>, for rows [K, 2m]."""
    m, cluster, gram = probe.num_samples.numel(), clusters(probe), probe.gram
    if len(cluster_sizes(probe)) == m:
        own = left.view(-1, 2, m) * right.view(-1, 2, m) * gram.diagonal().view(2, m)
        return (
            own.sum(1) + left[:, :m] * right[:, m:] * gram.diagonal(m) + left[:, m:] * right[:, :m] * gram.diagonal(-m)
        )
    x, y = (cluster[:, None] == cluster).nonzero().unbind(1)
    found = left[:, x] * (right[:, y] * gram[x, y] + right[:, m + y] * gram[x, m + y])
    found += left[:, m + x] * (right[:, y] * gram[m + x, y] + right[:, m + y] * gram[m + x, m + y])
    return cluster_sums(found, x, 1)


def refresh_moments(probe: ProbeGram, rows: Rows) -> Moments:
    r"""U-statistics of one refresh over the pairs of prompts of *different* clusters, and their leave-one-out changes.

    $U_{kl} = \frac{1}{m(m-1)} \sum_{x \ne x'} \langle g_k(x), g_l(x') \rangle$ where each prompt is a cluster of its
    own. Prompts of one cluster are not paired, and are left out together. Row and column sums give every leave-one-out
    value, so that all K gradients cost one product of [K, 2m] and [2m, 2m].

    Args:
        probe: m prompts of at least 3 clusters. Moments of `passk_rows` are computed once for each probe, and kept with
            it.
        rows: of the K gradients that are compared with g_1, e.g. `passk_rows(ks)`.
    """

    def make() -> Moments:
        return moments_of(probe, rows(probe), coefficients(probe, torch.ones(1, dtype=torch.int64)))

    return probe.keep(rows, make) if isinstance(rows, PassKRows) else make()


def moments_of(probe: ProbeGram, many: Tensor, one: Tensor) -> Moments:
    """The same for K rows `many` [K, 2m] against the row `one` [1, 2m] of any other gradient in the place of g_1."""
    m, cluster = probe.num_samples.numel(), clusters(probe)
    size = cluster_sizes(probe).double()
    count = m * m - size.square().sum()  # pairs; and without each cluster
    count_without = (m - size).square() - (size.square().sum() - size.square())
    one_product, many_product = one @ probe.gram, many @ probe.gram

    def pairs(left: Tensor, left_product: Tensor, right: Tensor, right_product: Tensor) -> tuple[Tensor, ...]:
        fold, fold_back, same = (
            cluster_sums(x, cluster, 1)
            for x in (
                (left * right_product).view(-1, 2, m).sum(1),
                (right * left_product).view(-1, 2, m).sum(1),
                _own_cluster(probe, left, right),
            )
        )
        everything = fold.sum(1)
        total = everything - same.sum(1)
        without = total[:, None] - fold - fold_back + 2 * same
        value = total / count
        return value, without / count_without - value[:, None], everything / m**2, same / count

    parts = [
        pairs(many, many_product, one, one_product),
        pairs(one.expand_as(many), one_product.expand_as(many), one, one_product),
        pairs(many, many_product, many, many_product),
    ]
    value, change, naive, own = (torch.stack([part[i] for part in parts], dim=-1) for i in range(4))
    # The moments are kept with `probe` itself.
    bare = ProbeGram(probe.gram, probe.num_samples, probe.num_correct, probe.prompt_keys)
    change, own = (x.transpose(0, 1).contiguous() for x in (change, own))
    return Moments(value, change, naive, own, partial(_overshoots, bare, many, one[0]))


def _overshoots(probe: ProbeGram, rows: Tensor, one: Tensor) -> Tensor:
    """[m, K, 3, 3] for the kernels of U_k1, U_11 and U_kk."""
    return torch.stack([_overshoot(probe, row, one) for row in rows], dim=1)


def _overshoot(probe: ProbeGram, many: Tensor, one: Tensor) -> Tensor:
    m, cluster = probe.num_samples.numel(), clusters(probe)

    def kernels() -> Iterator[Tensor]:
        for (rows, with_one), (_, with_many) in zip(_products(probe, one), _products(probe, many), strict=True):
            mixed = _times(many, rows, with_one) + _times(one, rows, with_many)
            yield torch.stack([mixed / 2, _times(one, rows, with_one), _times(many, rows, with_many)])

    mixed = other_prompt_sums(probe, many, one) + other_prompt_sums(probe, one, many)
    sums = torch.stack([mixed / 2, other_prompt_sums(probe, one, one), other_prompt_sums(probe, many, many)])
    size = cluster_sizes(probe).double()
    if len(size) == m:
        return overshoot_by_rows(kernels(), sums)
    # Pairs of clusters in place of pairs of prompts: sums around the mean, in units in which their mean is U's error.
    count = m * m - size.square().sum()
    whole, first = sums.new_zeros(3, len(size), len(size)), 0
    for block in kernels():
        rows = cluster[first : (first := first + block.shape[1])]
        whole.index_add_(1, rows, cluster_sums(block, cluster, 2))
    whole -= sums.sum(1)[:, None, None] / count * size[:, None] * size
    return jackknife_overshoot(whole * (len(size) * (len(size) - 1) / count))


def _products(probe: ProbeGram, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of some prompts x at a time [2, b, m]: <S+(x), h(x')> and <S-(x), h(x')> for all x'."""
    m = probe.num_samples.numel()
    sums = probe.gram.view(2, m, 2 * m)
    for first in range(0, m, _ROWS):  # a few rows stay in the cache, where the whole Gram matrix is half a GiB at 4096
        rows = slice(first, min(first + _ROWS, m))
        weighted = sums[:, rows] * right
        yield rows, weighted[..., :m] + weighted[..., m:]


def _times(left: Tensor, rows: slice, products: Tensor) -> Tensor:
    """[b, m] those prompts' rows of the kernel, from their `_products`."""
    positive, negative = left.view(2, -1)[:, rows, None]
    return positive * products[0] + negative * products[1]


def pooled_moments(probes: Sequence[ProbeGram], rows: Rows) -> Moments:
    """The same over several refreshes, each weighted by its number of prompts.

    A prompt or cluster that appears in several refreshes (equal `prompt_keys`) is left out of all of them together, so
    that a small probe set that is used again does not count as fresh data.
    """
    sizes = [probe.num_samples.numel() for probe in probes]
    parts = [refresh_moments(probe, rows) for probe in probes]
    if len(parts) == 1:
        return parts[0]
    owner = numbered(
        name
        for r, probe in enumerate(probes)
        for name in (dict.fromkeys(probe.prompt_keys) if len(probe.prompt_keys) else zip(repeat(r), range(sizes[r])))
    )
    weighted = [(size / sum(sizes), part) for size, part in zip(sizes, parts, strict=True)]

    def by_prompt(changes: list[Tensor]) -> Tensor:
        return cluster_sums(torch.cat(changes), owner)

    return Moments(
        value=torch.stack([w * part.value for w, part in weighted]).sum(0),
        influence=by_prompt([w * part.influence for w, part in weighted]),
        naive=torch.stack([w * part.naive for w, part in weighted]).sum(0),
        sizes=by_prompt([w * part.sizes for w, part in weighted]),
        find_overshoot=lambda: by_prompt([w**2 * part.overshoots for w, part in weighted]),
    )


def jackknife_overshoot(kernels: Tensor) -> Tensor:
    r"""[m, S, S] expected excess of the jackknife covariance of S U-statistics over their covariance: prompts' shares.

    By Hoeffding (1948) the kernel of a pair splits into $h(x, y) = \theta + h_1(x) + h_1(y) + h_2(x, y)$. The
    jackknife is right about the variance from $h_1$. It counts that of the degenerate $h_2$ twice, which is most of it
    with few prompts or noisy gradients: $4 \zeta_2/(m(m-2))$ in place of $2 \zeta_2/(m(m-1))$ (Efron & Stein 1981,
    *The jackknife estimate of variance*, Sec. 4). $\zeta_2$ is estimated from the residuals of the additive fit,
    without bias. A prompt's share is that of the pairs in which it is the first, and shows the error of the sum.

    Args:
        kernels: [S, m, m] symmetric, one matrix of pair values for each statistic; the diagonals are not used.

    Returns:
        Zero for fewer than 4 prompts, where no degree of freedom is left.
    """
    return overshoot_by_rows([kernels], kernels.sum(2) - kernels.diagonal(dim1=1, dim2=2))


def overshoot_by_rows(blocks: Iterable[Tensor], sums: Tensor) -> Tensor:
    """The same from blocks of rows of the kernels, so that no m x m matrix is needed.

    Args:
        blocks: [S, b, m] consecutive rows of the kernels, from the first to the last.
        sums: [S, m] sum of each row without its diagonal.
    """
    count, m = sums.shape
    shares, first = sums.new_zeros(m, count, count), 0
    if m < 4:
        return shares
    mean = sums / (m - 1)
    overall = mean.mean(1, keepdim=True)
    effect = (m - 1) / (m - 2) * (mean - overall)  # the best additive fit: theta + h_1(x) + h_1(y)
    for block in blocks:
        here = slice(first, first := first + block.shape[1])
        residuals = block - (overall + effect)[:, None] - effect[:, here, None]
        residuals.diagonal(here.start, 1, 2).zero_()
        shares[here] = torch.einsum("sbm,tbm->bst", residuals, residuals)
    return shares / (m * (m - 3)) * (4 / (m * (m - 2)) - 2 / (m * (m - 1)))


def without_overshoot(jackknife: Tensor, overshoot: Tensor) -> Tensor:
    """[..., S, S] jackknife - overshoot, in no direction less than half the jackknife.

    Args:
        jackknife: [..., S, S] covariance, positive semidefinite.
        overshoot: [..., S, S] of the same statistics.
    """
    spread = jackknife.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit = torch.where(spread > 0, spread, torch.ones_like(spread))  # the statistics may differ by many powers of ten
    scale = unit[..., :, None] * unit[..., None, :]
    size, axes = torch.linalg.eigh(jackknife / scale)
    size = size.clamp(min=1e-12)
    to_white, from_white = axes / size.sqrt()[..., None, :], axes * size.sqrt()[..., None, :]
    share = to_white.mT @ (overshoot / scale) @ to_white
    amount, rotation = torch.linalg.eigh((share + share.mT) / 2)
    taken = from_white @ rotation
    kept = jackknife - scale * (taken * amount.clamp(0, _LARGEST_SHARE)[..., None, :] @ taken.mT)
    missing = (1 - _LARGEST_SHARE) * spread.square() - kept.diagonal(dim1=-2, dim2=-1)  # rounding of what is singular
    return kept + torch.diag_embed(missing.clamp(min=0))
