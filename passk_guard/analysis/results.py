"""What an analysis found, as plain numbers and texts: the records behind `analysis.json`, written and read back.

A number is None wherever the probe does not determine it, and the `reason` beside it says why. Lists are in the order
of the settings' `ks`, and `prompts` in the order in which they were sampled. The file may come from elsewhere, so
reading checks every value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from passk_guard.analysis.page import analysis_page
from passk_guard.analysis.settings import Settings
from passk_guard.analysis.store import JSON_NAME, PAGE_NAME, check_folder
from passk_guard.estimation.records import Status
from passk_guard.planning.inputs import read_noise
from passk_guard.reporting.html.page import in_a_frame
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole
from passk_guard.utils.text import brief, describe_invalid

VERSION = 1
_EARLIER = ("paper",)  # fields and settings of earlier versions, which are passed over
_EARLIER_SETTINGS = ("protocol", "delta_1", "delta_2")
_LATER_SETTINGS = {"cluster_by": None}  # settings that earlier versions do not have, as those behave
_EXACT = ConfigDict(extra="forbid")
# Numbers beyond 1e300 have no place on a chart, and the difference of two of them is infinite.
Real = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e300, le=1e300)]
Whole = Annotated[int, Field(strict=True, gt=-(2**53), lt=2**53)]
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True, config=_EXACT)
class Number:
    """An estimate with its uncertainty.

    Attributes:
        value: the estimate; None where undetermined.
        standard_error: over prompts, by the jackknife unless stated otherwise.
        low, high: two-sided interval at the settings' confidence; None where only the standard error is known.
    """

    value: Real | None = None
    standard_error: Real | None = None
    low: Real | None = None
    high: Real | None = None


@dataclass(frozen=True, config=_EXACT)
class AtK:
    """Pass rate, weight and conflict at one k.

    Attributes:
        k: of pass@k.
        pass_rate: pass@k over prompts like the probe's, unbiased.
        mean_weight: E[w_k], unbiased.
        cosine: cos(grad J_k, grad J_1); at k = 1 it is 1 by definition, and is left None.
        inner_product: <grad J_k, grad J_1> = E[w_k a], the U-statistic over pairs of different prompts.
        status: "clear", "conflict" or "undetermined", as in `ConflictEstimate`; None at k = 1.
        reason: one sentence that explains the status.
    """

    k: Whole
    pass_rate: Number
    mean_weight: Number
    cosine: Number
    inner_product: Number
    status: Status | None
    reason: Text


@dataclass(frozen=True, config=_EXACT)
class Curve:
    """cos(grad J_k, grad J_1) for every k from 1 to the smallest number of samples of a prompt.

    Attributes:
        k, cosine, low, high: the curve with the two-sided interval of each k by itself; None where undetermined.
        established: whether the interval at this k is below the threshold.
        k_star: the largest k such that no conflict is established at it or below it.
        band_low, band_high: of the band that holds at all k together; None in analyses from before it was written.
        k_star_low, k_star_high: confidence set, from the band, of the largest k up to which there is no conflict. The
            last k stands for that one and all above. None as the band.
    """

    k: list[Whole]
    cosine: list[Real | None]
    low: list[Real | None]
    high: list[Real | None]
    established: list[Flag]
    k_star: Whole
    band_low: list[Real] | None = None
    band_high: list[Real] | None = None
    k_star_low: Whole | None = None
    k_star_high: Whole | None = None

    @model_validator(mode="after")
    def _one_number_for_every_k(self) -> Curve:
        new = (self.band_low, self.band_high, self.k_star_low, self.k_star_high)
        if None in new and new != (None,) * 4:
            raise ValueError("a part of the band and of the set of k*")
        lists = (self.k, self.cosine, self.low, self.high, self.established, *new[:2])
        lengths = {len(values) for values in lists if values is not None}
        if len(lengths) != 1 or not self.k or min(self.k) < 1:
            raise ValueError("not a number for every k")
        return self


@dataclass(frozen=True, config=_EXACT)
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
            first, each with <g_k(x), g_1(x')>. Single pairs are a ranking and have no interval.
    """

    place: Whole
    text: Text
    num_samples: Whole
    num_correct: Whole
    pass_rate: Number
    weight: Number
    agreement: Number
    weighted_agreement: Number
    share: Number
    hurts: list[tuple[Whole, Real]]

    @model_validator(mode="after")
    def _has_its_numbers(self) -> Prompt:
        weighted = (self.weighted_agreement.value, self.weight.value)
        if self.pass_rate.value is None or (self.agreement.value is not None and None in weighted):
            raise ValueError("a prompt without its pass rate or weight")
        return self


@dataclass(frozen=True, config=_EXACT)
class Kernel:
    """The estimated similarity kernel <g_1(x), g_1(x')> of the prompts with right and wrong samples both.

    Attributes:
        places: the prompts, from easy to hard.
        below: row i holds the i entries left of the diagonal, to four significant digits. The diagonal is left out:
            the noise of one prompt's samples dominates it.
        negative_pairs: share of the entries below zero.
    """

    places: list[Whole]
    below: list[list[Real]]
    negative_pairs: Number

    @model_validator(mode="after")
    def _is_a_triangle(self) -> Kernel:
        if [len(row) for row in self.below] != list(range(len(self.places))):
            raise ValueError("not a triangle of the prompts it names")
        return self


@dataclass(frozen=True, config=_EXACT)
class Prediction:
    """What a mitigation is predicted to do to the gradient of pass@k, from the same Gram matrix.

    Attributes:
        name: "project" or "floor".
        setting: in words, with its number.
        cosine: cos(mitigated gradient, grad J_1) to expect.
        kept: cos(mitigated gradient, grad J_k): the share of the first-order pass@k gain that a step of the same
            length has left.
        note: a remark, e.g. why there is no number.
    """

    name: Text
    setting: Text
    cosine: Number
    kept: Number
    note: Text


@dataclass(frozen=True, config=_EXACT)
class Sketch:
    """How gradients were projected, and of which parameters.

    Attributes:
        method, dim, seed: of the sketch.
        parameters: "all trainable parameters" or "last hidden layer".
        covered, total: trainable scalars among them that are sketched, and all of them.
        uncovered: names of those left out, largest first.
    """

    method: Text
    dim: Whole
    seed: Whole
    parameters: Text
    covered: Annotated[Whole, Field(ge=0)]
    total: Annotated[Whole, Field(gt=0)]
    uncovered: list[Text]

    @model_validator(mode="after")
    def _covers_a_part(self) -> Sketch:
        if self.covered > self.total:
            raise ValueError("more parameters covered than there are")
        return self


@dataclass(frozen=True, config=_EXACT)
class Analysis:
    """One checkpoint, measured with one probe.

    Attributes:
        model: `name`, as the user gave it, and `fingerprint`, of config and weights.
        settings: as in `Settings`.
        verifier: name of the function that means *correct*.
        num_prompts: m. Of these `left_out` had fewer verdicts than the largest k and count nowhere. `never_solved` and
            `always_solved` have no gradient estimate but zero and count in every mean.
        remark: what else a reader must know of the samples, e.g. calls of the verifier that raised.
        at_k: one entry for each k.
        curve: None where undetermined. Every entry of `at_k` then says why.
        mean_agreement: E[a], the mean before reweighting.
        reweighted_agreement: E[w_k a] / E[w_k] at the largest k, the mean after reweighting. Its standard error is that
            of E[w_k a] alone.
        prompts, kernel, predictions, sketch: see there.
        version: of this layout.
        noise: at the largest k, for `passk-guard plan`: `Noise.to_dict`. None below 4 prompts or without a gradient,
            and in analyses from before it was written.
    """

    model: dict[Text, Text]
    settings: dict[str, Any]
    verifier: Text
    num_prompts: Whole
    left_out: Whole
    never_solved: Whole
    always_solved: Whole
    remark: Text | None
    at_k: list[AtK]
    curve: Curve | None
    mean_agreement: Number
    reweighted_agreement: Number
    prompts: list[Prompt]
    kernel: Kernel
    predictions: list[Prediction]
    sketch: Sketch
    version: Whole = VERSION
    noise: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Analysis:
        if self.settings.keys() != Settings.model_fields.keys():
            raise ValueError("settings: other names than those of `Settings`")
        if [at.k for at in self.at_k] != list(Settings(**self.settings).ks):
            raise ValueError("at_k: not one entry for every k")
        if self.model.keys() != {"name", "fingerprint"}:
            raise ValueError("model: not a name and a fingerprint")
        if not set(self.kernel.places) <= {prompt.place for prompt in self.prompts}:
            raise ValueError("kernel: prompts that are not listed")
        if self.noise is not None:
            read_noise(self.noise)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings and lists of what JSON knows: the layout of `analysis.json`."""
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
        kept = {name: value for name, value in data.items() if name not in _EARLIER}
        if isinstance(settings := kept.get("settings"), Mapping):
            known = {name: value for name, value in settings.items() if name not in _EARLIER_SETTINGS}
            kept["settings"] = _LATER_SETTINGS | known
        try:
            return TypeAdapter(cls).validate_python(kept)
        except ValidationError as error:
            raise GuardError(
                f"Expected an analysis as `Analysis.save` writes it; {describe_invalid(error)}. Analyse again."
            ) from None

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write `analysis.json` and `analysis.html` into a folder, each whole or not at all.

        Raises:
            GuardError: the folder holds other files or an analysis of other settings, and `force` is not set; or
                plotly, which the page needs, is not installed.
        """
        folder = Path(folder)
        check_folder(folder, self.model["fingerprint"], self.settings, force=force)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / JSON_NAME, to_json(self.to_dict()))
        write_whole(folder / PAGE_NAME, analysis_page(self.to_dict()))

    def _repr_html_(self) -> str:
        """The page in a frame, for notebooks."""
        return in_a_frame(analysis_page(self.to_dict()))


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
