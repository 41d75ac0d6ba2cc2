"""One cell of the calibration: a population, a size of probe, a statistic, and what a thousand repetitions show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.calibration_populations import (
    FewHard,
    FewHardAlone,
    Pool,
    Population,
    RareAgree,
    RarestAgree,
    Synthetic,
    ThreeKinds,
    TwoKinds,
    with_cosine,
)
from benchmarks.calibration_statistics import STATISTICS, pool
from passk_guard.estimation.estimate import cosine_interval, no_signal
from passk_guard.estimation.intervals import corrected_cosine, cosine_bounds, student_t_quantile
from passk_guard.estimation.ustatistics import Moments

LEVELS = (0.90, 0.95)
_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Cell:
    """What is simulated. `cosine` is the truth of a synthetic population and the result for a pool.

    `cluster` prompts in a row are paraphrases of one; `named` says whether the statistic knows (`cluster_by`).
    """

    cosine: float = -0.3
    m: int = 64
    n: int = 16
    k: int = 8
    refreshes: int = 3
    noise: float = 0.1
    sketch_dim: int | None = None
    source: str = "synthetic"
    spread: float = 0.3
    cluster: int = 1
    named: bool = False

    def population(self) -> Population:
        settings = {name: getattr(self, name) for name in ("noise", "sketch_dim", "spread", "cluster")}
        return with_cosine(self.cosine, self.k, POPULATIONS[self.source], **settings)


POPULATIONS: dict[str, type[Synthetic]] = {
    "synthetic": Synthetic,
    "few hard": FewHard,
    "few hard alone": FewHardAlone,
    "rare agree": RareAgree,
    "rarest agree": RarestAgree,
    "three kinds": ThreeKinds,
    "two kinds": TwoKinds,
}


def synthetic_cells() -> Iterator[Cell]:
    """The default probe, and away from it in one direction at a time; then false alarms and power over the angle."""
    base = Cell()
    yield base
    yield from (replace(base, m=m) for m in (16, 32, 128, 256, 512))
    yield from (replace(base, n=n, k=k) for n, k in ((8, 4), (8, 8), (16, 4), (16, 16), (32, 8), (32, 16)))
    yield replace(base, k=2, cosine=0.9)  # at k = 2 these kinds of prompts cannot conflict
    yield from (replace(base, refreshes=r) for r in (1, 10))
    yield from (replace(base, noise=noise) for noise in (0.3, 1.0))
    yield from (replace(base, sketch_dim=dim) for dim in (256, 1024, 4096, 16384))
    yield from (replace(base, cosine=c) for c in (-0.5, -0.4, -0.2, -0.1, 0.3, 0.6))
    for cell in (base, replace(base, refreshes=1), replace(base, m=32), replace(base, m=256), replace(base, n=8, k=4)):
        yield replace(cell, cosine=0.0)
    yield from (replace(base, cosine=0.0, noise=noise) for noise in (0.3, 1.0))


def hard_cells() -> Iterator[Cell]:
    """Where few prompts carry a norm, a norm is hardly there, prompts are not independent, or all of that is likely."""
    one, base = Cell(refreshes=1), Cell()
    for cell in (one, base):
        yield from (replace(cell, source="few hard", cosine=-0.4, spread=spread) for spread in (0.1, 0.3))
        yield replace(cell, source="few hard alone", cosine=-0.81)
        yield from (replace(cell, source="rare agree", cosine=0.0, spread=spread) for spread in (0.02, 0.1, 0.3))
        yield from (replace(cell, source=name, cosine=0.0, spread=0.02) for name in ("three kinds", "two kinds"))
    yield replace(base, source="rarest agree", cosine=0.0, spread=0.02)
    for cosine in (-0.3, 0.0):
        yield from (replace(base, cosine=cosine, cluster=4, named=named) for named in (False, True))
        yield replace(base, cosine=cosine, cluster=4, named=True, m=256)
        yield replace(base, cosine=cosine, m=16)
    yield from (replace(one, cosine=0.9602, k=2, m=m) for m in (32, 64))  # as near to 1 as this population comes
    yield from (replace(cell, cosine=0.9) for cell in (one, base))


def pool_cells(source: str) -> Iterator[Cell]:
    """The same questions to real gradients; the truth is the pool's."""
    base = Cell(source=source)
    yield from (replace(base, m=m) for m in (32, 64, 256))
    yield replace(base, refreshes=1)
    yield replace(base, k=4, n=8)
    yield replace(base, k=2)


def measure(
    cell: Cell, population: Population, repetitions: int, seed: int, statistics: tuple[str, ...] = tuple(STATISTICS)
) -> list[dict[str, Any]]:
    """A record for each statistic: bias, coverage and the share of runs whose status is "conflict".

    Every repetition counts in `conflict`, in `below_truth`, the share whose status would be "conflict" at a threshold
    that equals the true cosine, and in `missed`, the share that shows an interval without the true cosine; `covered_*`
    and `bias` are of those in which a number is shown, `determined`.
    """
    truth = population.cosine(cell.k)
    generator = torch.Generator().manual_seed(seed)
    dim = population.scores.shape[-1] if isinstance(population, Pool) else 48
    at_once = max(1, min(repetitions, _VALUES_AT_ONCE // (cell.m * dim)))
    names = [name for name in statistics if name != "sample splitting" or cell.k <= cell.n // 2]
    found: dict[str, list[Moments]] = {name: [] for name in names}
    for start in range(0, repetitions, at_once):
        size = min(at_once, repetitions - start)
        draws = [population.draw(size, cell.m, cell.n, generator) for _ in range(cell.refreshes)]
        draws = [replace(draw, named=cell.cluster if cell.named else 1) for draw in draws]
        for name in names:
            found[name].append(pool([STATISTICS[name](draw, cell.k) for draw in draws]))
    return [
        asdict(cell) | {"cosine": round(truth, 4), "statistic": name} | _summary(found[name], truth, name == "guard")
        for name in names
    ]


def _summary(chunks: list[Moments], truth: float, as_shipped: bool) -> dict[str, Any]:
    looks = [look for chunk in chunks for look in _looks(chunk, truth, as_shipped)]
    shown = [look for look in looks if look["determined"]]
    cosine = torch.tensor([look["cosine"] for look in shown], dtype=torch.float64)
    record = {
        "repetitions": len(looks),
        "determined": len(shown) / len(looks),
        "conflict": sum(look["conflict"] for look in looks) / len(looks),
        "below_truth": sum(look["below_truth"] for look in looks) / len(looks),
    }
    if shown:
        record |= {"bias": float(cosine.mean()) - truth, "rmse": float((cosine - truth).square().mean().sqrt())}
        for level in LEVELS:
            held = sum(low <= truth <= high for low, high in (look[level] for look in shown))
            record[f"covered_{round(100 * level)}"] = held / len(shown)
        record["missed"] = (len(shown) - held) / len(looks)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}


def _looks(moments: Moments, truth: float, as_shipped: bool) -> Iterator[dict[Any, Any]]:
    """`as_shipped`: by the guard's rules. Else the degrees are those of all prompts, and any norms above 0 will do."""
    for i in range(len(moments.value)):
        one = moments.at(i)
        known = no_signal("pass@k", one) is None if as_shipped else bool((one.value[0, 1:] > 0).all())
        look: dict[Any, Any] = {"determined": known, "conflict": False, "below_truth": False}
        if known:
            for level in LEVELS:
                look[level] = _interval(one, level, as_shipped)
            look["determined"] = look[0.95] != (-1.0, 1.0)
            look["conflict"], look["below_truth"] = look[0.95][1] < 0, look[0.95][1] < truth
            look["cosine"] = corrected_cosine(one.value[0], one.covariance[0])[0] if as_shipped else _ratio(one)
        yield look


def _interval(one: Moments, level: float, as_shipped: bool) -> tuple[float, float]:
    if as_shipped:
        return cosine_interval(one, level) or (-1.0, 1.0)
    quantile = student_t_quantile((1 + level) / 2, len(one.influence) - 1.0)
    return cosine_bounds(one.value[0], one.covariance[0], lambda c: torch.full_like(c, quantile))


def _ratio(one: Moments) -> float:
    inner, norm1_sq, normk_sq = one.value[0].tolist()
    return max(-1.0, min(1.0, inner / (norm1_sq * normk_sq) ** 0.5))
