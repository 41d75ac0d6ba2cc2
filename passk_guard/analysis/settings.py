"""Every setting of an analysis, and which of them its samples depend on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import describe_invalid

_OF_THE_SAMPLES = ("num_samples", "prompts", "temperature", "max_new_tokens", "batch_size", "seed")
_LARGEST = 1e300
Whole = Annotated[int, Field(strict=True, lt=2**31)]
AtLeast1 = Annotated[Whole, Field(ge=1)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=-_LARGEST, lt=_LARGEST)]
Share = Annotated[Real, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """What to measure, and how.

    Attributes:
        ks: the k of pass@k, each at most `num_samples`. 1 is always among them. Prompts, weights and mitigations are
            shown for the largest.
        num_samples: n, completions of each prompt.
        prompts: m, prompts sampled from the probe with `seed`, at least 3, since they are compared in pairs. None
            takes all, in their order.
        cluster_by: column of the probe that prompts share which are not independent, such as a template or a source
            problem. Those of one value are not paired, and count as one draw in every error. None: all are independent.
        temperature: of the sampling, and of the policy whose score vectors are taken. Pass the one of training.
        max_new_tokens: longest completion, in tokens.
        batch_size: completions generated at once.
        seed: of the choice of prompts, of the sampling and of the sketch.
        sketch_method, sketch_dim: as for `ScoreSketcher`.
        max_tokens: tokens, padding included, in one forward pass of the sketch; None chooses it from the free memory,
            and so that there are several passes.
        last_layer: sketch the last hidden layer's parameters alone (see `load.last_hidden_layer`).
        threshold: cosine below which there is a conflict.
        confidence: of every interval, two-sided. The status at a k follows from its interval.
        correct_threshold: rewards at or above it count as correct.
        gamma: cosine that the prediction for `project` assumes. floor_gamma: cosine that the predicted floor is solved
            for. The guard's defaults are 0.2 for both.

    Raises:
        GuardError: a value outside its range, or a k above `num_samples`.
        TypeError: a setting that does not exist.
    """

    model_config = ConfigDict(frozen=True)

    ks: tuple[AtLeast1, ...] = (1, 2, 4, 8, 16)
    num_samples: Annotated[Whole, Field(ge=2)] = 32
    prompts: Annotated[Whole, Field(ge=3)] | None = None
    cluster_by: Annotated[str, Field(strict=True)] | None = None
    temperature: Annotated[Real, Field(gt=0)] = 1.0
    max_new_tokens: AtLeast1 = 256
    batch_size: AtLeast1 = 64
    seed: Annotated[int, Field(strict=True, gt=-(2**53), lt=2**53)] = 0
    sketch_method: Literal["kronecker", "countsketch", "identity"] = "kronecker"
    sketch_dim: AtLeast1 = 16384
    max_tokens: AtLeast1 | None = None
    last_layer: Annotated[bool, Field(strict=True)] = False
    threshold: Annotated[Real, Field(gt=-1, lt=1)] = 0.0
    confidence: Annotated[Real, Field(gt=0.5, lt=1)] = 0.95
    correct_threshold: Real = 1.0
    gamma: Share = 0.2
    floor_gamma: Share = 0.2

    def __init__(self, **given: Any) -> None:
        known = type(self).model_fields
        if unknown := sorted(given.keys() - known.keys()):
            raise TypeError(f"Expected settings of an analysis; found {unknown[0]!r}. There are {', '.join(known)}.")
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise GuardError(f"Settings of an analysis: {describe_invalid(error)}.") from None

    @field_validator("ks")
    @classmethod
    def _with_one(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({1, *ks}))

    @model_validator(mode="after")
    def _samples_reach_k(self) -> Settings:
        if self.k > self.num_samples:
            raise ValueError(
                f"Expected `num_samples` >= k; found num_samples={self.num_samples}, k={self.k}. No unbiased estimate "
                "exists above the number of samples: raise `num_samples` or lower `k`"
            )
        return self

    @property
    def k(self) -> int:
        """The largest k."""
        return self.ks[-1]

    def of_the_samples(self) -> dict[str, Any]:
        """The settings that the completions depend on."""
        return {name: getattr(self, name) for name in _OF_THE_SAMPLES}

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON has them."""
        return self.model_dump() | {"ks": list(self.ks)}
