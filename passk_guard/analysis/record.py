"""What an analysis found, as plain numbers and texts: the records behind `analysis.json`.

None stands wherever the probe does not determine a number; the `reason` beside it says why. Lists are in the order of
the settings' `ks`, `prompts` in the order in which they were drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from passk_guard.analysis.folder import JSON_NAME, PAGE_NAME, check_folder
from passk_guard.analysis.json_text import to_json
from passk_guard.pages import in_a_frame
from passk_guard.pages.analysis_page import analysis_page
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole
from passk_guard.utils.text import brief

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
        from passk_guard.analysis.reading import analysis_from

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
