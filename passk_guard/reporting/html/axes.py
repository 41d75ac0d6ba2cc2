"""From values to places on a chart: ranges, ticks at round numbers, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

_LARGEST, _SMALLEST = 1e300, 1e-300
_TELLS_APART = 1e-12  # of its ends, the least width of an axis: ticks are computed in float64


@dataclass(frozen=True)
class Axis:
    """A linear or base-2 logarithmic map of [low, high] to [start, end] in user units.

    Attributes:
        ticks: values that get a label.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    log: bool = False

    def at(self, value: float) -> float:
        """Where the value stands, rounded to a tenth of a unit; outside values are set on the border."""
        low, high, value = (self._linear(v) for v in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def _linear(self, value: float) -> float:
        return math.log2(value) if self.log else value

    @property
    def labels(self) -> list[str]:
        """Text of each tick, all with the same number of decimals."""
        gaps = [b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)]
        return [write_number(tick, min(gaps, default=1.0)) for tick in self.ticks]


def make_axis(
    values: Iterable[float | None],
    start: float,
    end: float,
    *,
    bounds: tuple[float, float] | None = None,
    ticks: Sequence[float] | None = None,
    log: bool = False,
    whole: bool = False,
    count: int = 6,
) -> Axis:
    """An axis from `start` to `end`, in user units, over the finite values, or `bounds`; with `log` those above 0.

    About `count` ticks stand at round numbers, `whole` ones, or at the values of `ticks`.
    """
    finite = [v for v in values if is_number(v) and (v > _SMALLEST or not log)]
    low, high = bounds or (min(finite, default=0.0), max(finite, default=1.0))
    if high - low <= max(_SMALLEST, _TELLS_APART * max(abs(low), abs(high))):
        low, high = (low / 2, high * 2) if log else (low - _slack(low), high + _slack(high))
    if log:
        chosen = ticks or [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    else:
        chosen = ticks or round_ticks(low, high, count, whole=whole)
    return Axis(low, high, start, end, chosen, log)


def padded(values: Iterable[float | None], share: float = 0.06) -> tuple[float, float] | None:
    """The range of the finite values with some room on both sides; None without values."""
    finite = [v for v in values if is_number(v)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room = share * (high - low) or _slack(low)
    return low - room, high + room


def round_ticks(low: float, high: float, count: int = 6, *, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `count`; unless `whole`, at least one."""
    rough = (high - low) / max(count - 1, 2)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [m * power for m in (1, 2, 5, 10) if m * power <= high - low]  # a longer one could miss the range
    step = next((step for step in steps if step >= rough * 0.999), steps[-1])
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def write_number(value: float | None, gap: float | None = None) -> str:
    """A number as it is read: a true minus sign, and as many digits as tell it from others `gap` apart.

    Without `gap`, four significant digits; a dash for None and NaN.
    """
    if not is_number(value):
        return "–"
    if gap is None:
        text = f"{value:.4g}"
    elif max(abs(value), gap) >= 1e6 or gap < 1e-4:
        text = f"{value:.3g}"
    else:
        text = f"{value:.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a number that a chart can place: finite, and not so large that a range of two would not be."""
    return value is not None and abs(value) <= _LARGEST  # False of NaN; whole numbers may be beyond any float


def _slack(value: float) -> float:
    return abs(value) * 0.1 or 1.0
