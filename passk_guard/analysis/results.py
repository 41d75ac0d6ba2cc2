"""From the mappings of `analysis.json` back to records, each value of its type: the file may come from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from passk_guard.analysis import results as record
from passk_guard.analysis.page import analysis_page
from passk_guard.analysis.settings import Settings
from passk_guard.analysis.store import JSON_NAME, PAGE_NAME, check_folder
from passk_guard.estimation.noise import noise_from
from passk_guard.reporting.html.page import in_a_frame
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole
from passk_guard.utils.text import brief, one_line

# JSON that every reader takes: no NaN, no infinity.


def to_json(value: Any) -> str:
    """Indented JSON text, lists of numbers on one line each.

    Raises:
        ValueError: a number that is NaN or infinite, which is a slip in this package.
    """
    return _written(value, "") + "\n"


def _written(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = (f"{deeper}{json.dumps(str(key))}: {_written(one, deeper)}" for key, one in value.items())
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(one, (dict, list, tuple)) for one in value):
        return "[\n" + ",\n".join(deeper + _written(one, deeper) for one in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


# What an analysis found, as plain numbers and texts: the records behind `analysis.json`.
#
# None stands wherever the probe does not determine a number; the `reason` beside it says why. Lists are in the order of
# the settings' `ks`, `prompts` in the order in which they were drawn.


VERSION = 1


@dataclass(frozen=True)
class Number:
    """An estimate with its uncertainty.

    Attributes:
        value: the estimate; None where undetermined.
        standard_error: over prompts, by the jackknife unless said otherwise.
        low, high: two-sided interval at the settings' confidence; None where only the standard error is known.
    """

    value: float | None = None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class AtK:
    """What holds at one k.

    Attributes:
        k: of pass@k.
        pass_rate: pass@k over prompts like the probe's, unbiased.
        mean_weight: E[w_k], unbiased.
        cosine: cos(grad J_k, grad J_1); at k = 1 it is 1 by definition, and is left None.
        inner_product: <grad J_k, grad J_1> = E[w_k a], the U-statistic over pairs of different prompts.
        status: "clear", "conflict" or "undetermined", as in `ConflictEstimate`; None at k = 1.
        reason: one sentence on the status.
    """

    k: int
    pass_rate: Number
    mean_weight: Number
    cosine: Number
    inner_product: Number
    status: str | None
    reason: str


@dataclass(frozen=True)
class Curve:
    """cos(grad J_k, grad J_1) for every k from 1 to the smallest number of samples of a prompt.

    Attributes:
        k, cosine, low, high: entries of the curve and of its two-sided band; None where undetermined.
        established: whether a conflict is established at this k, one-sided.
        k_star: the largest k such that no conflict is established at it or below it.
    """

    k: list[int]
    cosine: list[float | None]
    low: list[float | None]
    high: list[float | None]
    established: list[bool]
    k_star: int


@dataclass(frozen=True)
class Prompt:
    """One prompt, at the largest k.

    Attributes:
        place: its number in the analysis, from 0.
        text: the prompt; of a conversation all messages, each after its role.
        num_samples, num_correct: n and c, samples with a verdict and correct ones.
        pass_rate: p-hat = c/n with Wilson's interval.
        weight: w_k(p), unbiased, with the interval that follows from that of p.
        agreement: a(x); its standard error is over the other prompts. None without right and wrong samples both.
        weighted_agreement: w_k(x) a(x), unbiased: its mean over prompts is <grad J_k, grad J_1>.
        share: of the conflict: the part of the sum of all negative weighted agreements that is this prompt's; 0 for
            one that agrees.
        hurts: up to three places of the prompts whose p falls most, to first order, in a step along g_k(x), worst
            first, each with <g_k(x), g_1(x')>. Single pairs are a ranking: they carry no uncertainty of their own.
    """

    place: int
    text: str
    num_samples: int
    num_correct: int
    pass_rate: Number
    weight: Number
    agreement: Number
    weighted_agreement: Number
    share: Number
    hurts: list[tuple[int, float]]


@dataclass(frozen=True)
class Kernel:
    """The estimated similarity kernel <g_1(x), g_1(x')> of the prompts with right and wrong samples both.

    Attributes:
        places: the prompts, from easy to hard.
        below: row i holds the i entries left of the diagonal, to four significant digits. The diagonal is left out:
            with the noise of one prompt's own samples it says nothing about p.
        negative_pairs: share of the entries below zero.
    """

    places: list[int]
    below: list[list[float]]
    negative_pairs: Number


@dataclass(frozen=True)
class Prediction:
    """What a mitigation is predicted to do to the gradient of pass@k, from the same Gram matrix.

    Attributes:
        name: "project" or "floor".
        setting: in words, with its number.
        cosine: cos(mitigated gradient, grad J_1) to expect.
        kept: cos(mitigated gradient, grad J_k): the share of the first-order pass@k gain that a step of the same
            length has left.
        note: what to read with it, among others why there is no number.
    """

    name: str
    setting: str
    cosine: Number
    kept: Number
    note: str


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's table: one set of parameters, one k (see `analysis.paper`).

    Attributes:
        parameters: "all trainable parameters" or "last hidden layer".
        k: of pass@k.
        paper: the inner product as the paper sums it: all pairs, plug-in weights, no baseline. Biased.
        hard, easy, middle: the three groups' parts of `paper`, which they sum to.
        ours: the unbiased U-statistic on the same samples.
        cosine: with its interval; status, reason: of it.
    """

    parameters: str
    k: int
    paper: Number
    hard: Number
    easy: Number
    middle: Number
    ours: Number
    cosine: Number
    status: str
    reason: str


@dataclass(frozen=True)
class PaperTable:
    """arXiv 2602.21189's protocol: thresholds, counts of prompts on either side, and its inner products."""

    delta_1: float
    delta_2: float
    num_hard: int
    num_easy: int
    num_middle: int
    rows: list[PaperRow]


@dataclass(frozen=True)
class Sketch:
    """How gradients were made small, and of which parameters.

    Attributes:
        method, dim, seed: of the sketch.
        parameters: "all trainable parameters" or "last hidden layer".
        covered, total: trainable scalars among them that are sketched, and all of them.
        uncovered: names of those left out, largest first.
    """

    method: str
    dim: int
    seed: int
    parameters: str
    covered: int
    total: int
    uncovered: list[str]


@dataclass(frozen=True)
class Analysis:
    """One checkpoint, looked at with one probe.

    Attributes:
        model: `name`, as the user gave it, and `fingerprint`, of config and weights.
        settings: as in `Settings`.
        verifier: name of the function that means *correct*.
        num_prompts: m; of these `left_out` had fewer verdicts than the largest k and count nowhere, `never_solved`
            and `always_solved` have no gradient estimate but zero and count in every mean.
        remark: what else a reader must know of the samples, e.g. calls of the verifier that raised.
        at_k: one entry for each k.
        curve: None where undetermined; then every entry of `at_k` says why.
        mean_agreement: E[a], the mean before reweighting.
        reweighted_agreement: E[w_k a] / E[w_k] at the largest k, the mean after reweighting; its standard error is
            that of E[w_k a] alone.
        prompts, kernel, predictions, paper, sketch: see there. `paper` is None without `protocol="paper"`.
        version: of this layout.
        noise: at the largest k, for `passk-guard plan`: `Noise.to_dict`; None below 4 prompts or without a gradient,
            and in analyses of before it was written.
    """

    model: dict[str, str]
    settings: dict[str, Any]
    verifier: str
    num_prompts: int
    left_out: int
    never_solved: int
    always_solved: int
    remark: str | None
    at_k: list[AtK]
    curve: Curve | None
    mean_agreement: Number
    reweighted_agreement: Number
    prompts: list[Prompt]
    kernel: Kernel
    predictions: list[Prediction]
    paper: PaperTable | None
    sketch: Sketch
    version: int = field(default=VERSION)
    noise: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings and lists of what JSON knows; the layout of `analysis.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Analysis:
        """The inverse of `to_dict`, also after JSON.

        Raises:
            GuardError: another version, fields that are missing or unknown, or values of another type.
        """

        version = data.get("version") if isinstance(data, Mapping) else None
        if version != VERSION:
            raise GuardError(f"Expected an analysis of version {VERSION}; found {brief(version)}.")
        return analysis_from(data)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write `analysis.json` and `analysis.html` into a folder, each whole or not at all.

        Raises:
            GuardError: the folder holds other files or an analysis of other settings, and `force` is not set.
        """
        folder = Path(folder)
        check_folder(folder, self.model["fingerprint"], self.settings, force=force)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / JSON_NAME, to_json(self.to_dict()))
        write_whole(folder / PAGE_NAME, analysis_page(self.to_dict()))

    def _repr_html_(self) -> str:
        """The page, in a frame of its own, for notebooks."""
        return in_a_frame(analysis_page(self.to_dict()))


T = TypeVar("T")
_LARGEST = 1e300  # numbers beyond cannot be drawn, and differences of two of them not be held


def analysis_from(data: Mapping[str, Any]) -> record.Analysis:
    """The record of nested mappings; see `Analysis.from_dict`."""
    analysis = _record(record.Analysis, data)
    if analysis.settings.keys() != Settings.__dataclass_fields__.keys():
        raise _difference("settings", analysis.settings)
    Settings(**analysis.settings)
    if analysis.noise is not None:
        noise_from(analysis.noise)
    for what, holds in _RELATIONS.items():
        if not holds(analysis):
            raise GuardError(f"Expected an analysis in which {what}; found others. Make it anew.")
    return analysis


_RELATIONS: Mapping[str, Callable[[record.Analysis], bool]] = {
    "there is an entry for every k": lambda a: [at.k for at in a.at_k] == list(a.settings["ks"]),
    "every status is a known one": lambda a: (
        {at.status for at in a.at_k} <= {"clear", "conflict", "undetermined", None}
    ),
    "the model has a name and a fingerprint": lambda a: a.model.keys() == {"name", "fingerprint"},
    "the curve has a number for every k": lambda a: (
        a.curve is None
        or (
            {len(a.curve.k)} == {len(v) for v in (a.curve.cosine, a.curve.low, a.curve.high, a.curve.established)}
            and len(a.curve.k) > 0
            and min(a.curve.k) > 0
        )
    ),
    "the kernel is a triangle of the prompts it names": lambda a: (
        [len(row) for row in a.kernel.below] == list(range(len(a.kernel.places)))
        and set(a.kernel.places) <= {prompt.place for prompt in a.prompts}
    ),
    "prompts have pass rates, and weights": lambda a: all(
        p.pass_rate.value is not None
        and (p.agreement.value is None or None not in (p.weighted_agreement.value, p.weight.value))
        for p in a.prompts
    ),
    "a sketch covers a part of what there is": lambda a: 0 <= a.sketch.covered <= a.sketch.total and a.sketch.total > 0,
}


def _record(kind: type[T], data: Any) -> T:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if isinstance(data, Mapping):  # what came later has a default, and is not in older files
        later = {field.name for field in fields(kind) if field.default is not MISSING} - data.keys()  # type: ignore[arg-type]
        names -= later
    if not isinstance(data, Mapping) or data.keys() != names:
        keys = data.keys() ^ names if isinstance(data, Mapping) else [type(data).__name__]
        found = sorted(one_line(str(key), 80) for key in keys)
        raise GuardError(f"Expected the fields of {kind.__name__} in an analysis; found a difference: {found}.")
    hints = get_type_hints(kind, vars(record))
    return kind(**{name: _value(hints[name], data[name], f"{kind.__name__}.{name}") for name in names})


def _value(hint: Any, value: Any, where: str) -> Any:
    arms = get_args(hint)
    if NoneType in arms:
        return None if value is None else _value(next(arm for arm in arms if arm is not NoneType), value, where)
    if is_dataclass(hint):
        return _record(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) in (list, tuple):
        several = arms if get_origin(hint) is tuple else None
        if not isinstance(value, (list, tuple)) or (several and len(value) != len(several)):
            raise _difference(where, value)
        parts = [_value(arm, one, where) for arm, one in zip(several or arms * len(value), value, strict=True)]
        return tuple(parts) if several else parts
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _difference(where, value)
        return {key: _value(arms[1], one, where) for key, one in value.items()}
    if not _is_a(hint, value):
        raise _difference(where, value)
    return value


def _is_a(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) < 2**53
    return type(value) is kind


def _difference(where: str, value: Any) -> GuardError:
    return GuardError(f"Expected `{where}` of an analysis as it was written; found {brief(value)}. Make it anew.")
