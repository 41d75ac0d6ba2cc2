"""Every setting of an analysis, and which of them its samples depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

_COUNTS = ("num_samples", "max_new_tokens", "batch_size", "sketch_dim", "max_tokens")
_REALS = ("temperature", "threshold", "confidence", "correct_threshold", "gamma", "floor_gamma", "delta_1", "delta_2")
_METHODS = ("kronecker", "countsketch", "identity")
_LARGEST = 1e300
_OF_THE_SAMPLES = ("num_samples", "prompts", "temperature", "max_new_tokens", "batch_size", "seed")


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    Attributes:
        ks: the k of pass@k, each at most `num_samples`; 1 is always among them. The largest is the one that
            prompts, weights and mitigations are shown for.
        num_samples: n, completions of each prompt.
        prompts: m, prompts drawn at random from the probe with `seed`; None takes all, in their order.
        temperature: of the sampling; the score vectors are taken at the same one.
        max_new_tokens: longest completion, in tokens.
        batch_size: completions generated at once.
        seed: of the draw of prompts, of the sampling and of the sketch.
        sketch_method, sketch_dim: as for `ScoreSketcher`.
        max_tokens: tokens, padding included, in one forward pass of the sketch.
        last_layer: sketch the last hidden layer's parameters alone (see `analysis.last_layer`).
        threshold: cosine below which there is a conflict.
        confidence: of every interval (two-sided) and of the verdicts (one-sided).
        correct_threshold: rewards from here on count as correct.
        gamma: cosine asked of `project` in its prediction; floor_gamma: of the solved floor. The guard's defaults.
        protocol: "paper" adds the table of arXiv 2602.21189 (see `analysis.paper`).
        delta_1, delta_2: in that table a prompt is hard for p-hat <= delta_1 and easy for p-hat >= delta_2.

    Raises:
        GuardError: a value outside its range, or a k above `num_samples`.
    """

    ks: Sequence[int] = (1, 2, 4, 8, 16)
    num_samples: int = 32
    prompts: int | None = None
    temperature: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0
    sketch_method: Literal["kronecker", "countsketch", "identity"] = "kronecker"
    sketch_dim: int = 16384
    max_tokens: int = 16384
    last_layer: bool = False
    threshold: float = 0.0
    confidence: float = 0.95
    correct_threshold: float = 1.0
    gamma: float = 0.2
    floor_gamma: float = 0.2
    protocol: Literal["paper"] | None = None
    delta_1: float = 0.25
    delta_2: float = 0.75

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "ks", tuple(sorted({1, *self.ks})))
        self._check_ks()
        if self.prompts is not None and self.prompts < 3:
            raise GuardError(f"Expected `prompts` >= 3, since prompts are compared in pairs; found {self.prompts}.")
        if not 0.5 < self.confidence < 1 or not -1 < self.threshold < 1:
            raise GuardError(
                "Expected 0.5 < `confidence` < 1 and -1 < `threshold` < 1; found "
                f"confidence={self.confidence}, threshold={self.threshold}."
            )
        if not 0 <= self.gamma < 1 or not 0 <= self.floor_gamma < 1:
            raise GuardError(
                f"Expected `gamma` and `floor_gamma` in [0, 1); found {self.gamma} and {self.floor_gamma}. The guard's "
                "defaults are 0.2 and 0."
            )
        if self.protocol not in (None, "paper"):
            raise GuardError(f"Expected `protocol` 'paper' or None; found {brief(self.protocol)}.")
        if not 0 <= self.delta_1 < self.delta_2 <= 1:
            raise GuardError(
                f"Expected 0 <= `delta_1` < `delta_2` <= 1; found delta_1={self.delta_1}, delta_2={self.delta_2}."
            )
        if not math.isfinite(self.temperature) or self.temperature <= 0:
            raise GuardError(f"Expected `temperature` > 0; found {self.temperature}. Pass the one of training.")

    def _check_types(self) -> None:
        if not isinstance(self.ks, (list, tuple, range)) or not all(type(k) is int for k in self.ks):
            raise GuardError(f"Expected `ks` to be a list of whole numbers; found {brief(self.ks)}.")
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise GuardError(f"Expected `{name}` to be a whole number >= 1; found {brief(value)}.")
        for name, value in (("seed", self.seed), ("prompts", self.prompts)):
            if type(value) is not int and (name, value) != ("prompts", None):
                raise GuardError(f"Expected `{name}` to be a whole number; found {brief(value)}.")
        if abs(self.seed) >= 2**53:
            raise GuardError(f"Expected `seed` below 2^53; found {brief(self.seed)}.")
        for name in _REALS:
            value = getattr(self, name)
            if type(value) not in (int, float) or not -_LARGEST < value < _LARGEST:
                raise GuardError(f"Expected `{name}` to be a finite number; found {brief(value)}.")
        if type(self.last_layer) is not bool or self.sketch_method not in _METHODS:
            raise GuardError(
                f"Expected `last_layer` true or false and `sketch_method` one of {', '.join(_METHODS)}; found "
                f"{brief(self.last_layer)} and {brief(self.sketch_method)}."
            )

    def _check_ks(self) -> None:
        if self.ks[0] < 1:
            raise GuardError(f"Expected every `k` >= 1; found k={self.ks[0]}.")
        if self.num_samples < 2 or self.ks[-1] > self.num_samples:
            raise GuardError(
                f"Expected `num_samples` >= k, and at least 2; found num_samples={self.num_samples}, k={self.ks[-1]}. "
                "No unbiased estimate exists above the number of samples: raise `num_samples` or lower `k`."
            )

    @property
    def k(self) -> int:
        """The largest k."""
        return self.ks[-1]

    def of_the_samples(self) -> dict[str, Any]:
        """The settings that the completions depend on."""
        return {name: getattr(self, name) for name in _OF_THE_SAMPLES}

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON has them."""
        return asdict(self) | {"ks": list(self.ks)}
