"""Every setting of the guard, with its bounds and its help; from Python, YAML or a command line (TrlParser)."""

from __future__ import annotations

import dataclasses
import difflib
import json
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief, describe_error, one_line


def _setting(default: Any, text: str) -> Any:
    # HfArgumentParser hands everything in the metadata to argparse, so the bounds are in the annotations instead.
    return dataclasses.field(default=default, metadata={"help": text})


_LARGEST = 2**31 - 1  # what torch and the seeds made of these numbers can hold
Whole = Annotated[int, Field(le=_LARGEST)]
AtLeast1 = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Real = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GuardConfig:
    """Settings of `PassKGuardCallback`.

    Raises:
        pydantic.ValidationError (a ValueError): a value outside its bounds, k above num_samples, or an unknown name.
    """

    k: Annotated[Whole, Field(ge=2)] = _setting(8, "The k of pass@k whose gradient is watched.")
    probe_prompts: Annotated[Whole, Field(ge=3)] = _setting(
        64, "Prompts drawn from the probe set for each refresh, over all ranks."
    )
    num_samples: Annotated[Whole, Field(ge=2)] = _setting(16, "Completions sampled of each probe prompt; at least k.")
    refresh_steps: AtLeast1 = _setting(5, "Optimizer steps between refreshes of the estimate.")
    pool_refreshes: AtLeast1 = _setting(
        3, "Newest refreshes whose statistics are averaged for the estimate, of each draw its newest."
    )
    resample_refreshes: AtLeast1 = _setting(
        1,
        "Refreshes that one draw of completions serves: sampled and scored at the first, reweighted to the policy of "
        "the moment at the others. 1 samples every time. Patience, cooldown and CONFLICT over the whole run count "
        "draws, and a checkpoint ends one.",
    )
    min_effective_samples: Annotated[Real, Field(gt=0, le=1)] = _setting(
        0.8,
        "Share of its completions that a draw must still be worth to be used again; below it the same refresh samples "
        "afresh. Less is as unbiased and finds fewer conflicts.",
    )
    threshold: Annotated[Real, Field(gt=-1, lt=1)] = _setting(0.0, "Cosine below which the two gradients conflict.")
    confidence: Annotated[Real, Field(gt=0.5, lt=1)] = _setting(0.95, "Confidence of the interval and of the verdict.")
    alert_rule: Literal["whole_run", "each_look"] = _setting(
        "whole_run",
        "When CONFLICT is said: whole_run, once the evidence of all refreshes establishes it with a chance of at most "
        "1 - confidence of any false alert in the run; each_look, when `patience` refreshes in a row do, each alone.",
    )
    patience: AtLeast1 = _setting(
        2, "Refreshes in a row that must agree before the verdict changes; CONFLICT by whole_run needs none."
    )
    cooldown: AtLeast1 = _setting(3, "Refreshes in a row without an established conflict that end a CONFLICT.")
    mitigation: Literal["off", "project", "reweight", "both", "auto"] = _setting(
        "off",
        "off observes; project turns the training gradient, before clipping and the optimizer and as little as "
        "possible, towards the probe's pass@1 gradient until their cosine is gamma; reweight solves for a floor under "
        "the prompt weights of the PassKObjective and touches no gradient; both does both; auto reweights where a "
        "PassKObjective is installed and projects elsewhere.",
    )
    gamma: Annotated[Real, Field(ge=0, lt=1)] = _setting(
        0.2, "Cosine that project restores; 0 only removes the conflict and does not protect pass@1."
    )
    gate: Literal["always", "conflict"] = _setting(
        "always",
        "When project keeps the margin: always, or only while the newest estimate is in conflict at gate_confidence. "
        "The cosine turns acute after the damage is done, and a gate that closes then leaves the run as damaged.",
    )
    gate_confidence: Annotated[Real, Field(gt=0.5, lt=1)] = _setting(
        0.8413, "One-sided confidence from which a conflict opens the gate; the default is one standard error."
    )
    protected_average: Annotated[Real, Field(ge=0, lt=1)] = _setting(
        0.0, "Weight of the past in the exponential average of the protected gradient over refreshes."
    )
    protected_dtype: Literal["float32", "bfloat16"] = _setting(
        "float32", "Dtype the protected gradient is kept in; bfloat16 halves its memory."
    )
    floor_gamma: Annotated[Real, Field(ge=0, lt=1)] = _setting(
        0.2, "Cosine to the pass@1 gradient that the floor of reweight is solved for."
    )
    floor_max: Annotated[Real, Field(gt=0)] = _setting(
        1.0, "Largest floor; 1 is the weight that pass@1 gives every prompt, k would make the run one on pass@1."
    )
    floor_average: Annotated[Real, Field(ge=0, lt=1)] = _setting(
        0.8, "Weight of the past in the average of the floor over refreshes; without one it lets go too early."
    )
    correct_threshold: Real = _setting(1.0, "Rewards at or above it count as correct.")
    verifier_timeout: Annotated[Real, Field(ge=0)] = _setting(
        300.0,
        "Seconds that scoring the completions of one refresh may take on a rank; a function that is not done by then "
        "is stopped, and the refresh is void. At most half of ddp_timeout with several ranks. 0 sets no limit.",
    )
    instruments: Literal["both", "change", "angle"] = _setting(
        "both",
        "What is measured. change is the realised change of pass@1 and pass@k over the steps between two refreshes: it "
        "takes forward passes alone and works for any model. angle is the cosine of the two gradients. The training "
        "batch as source has an angle only.",
    )
    group_by: str | None = _setting(
        None, "Column of the probe whose groups get a realised change of their own, at most 20 values."
    )
    on_loss: Literal["alert", "stop"] = _setting(
        "alert",
        "What follows when the loss of pass@1 is established to exceed max_loss: an alert, or the end of training.",
    )
    max_loss: Annotated[Real, Field(gt=0, lt=1)] | None = _setting(
        None, "Largest loss of pass@1 since the start that on_loss accepts, such as 0.05; None accepts any."
    )
    source: Literal["held_out", "training_batch"] = _setting(
        "held_out",
        "Where the probe's completions come from: held_out samples the probe set; training_batch reuses the batch a "
        "GRPO/RLOO trainer has just generated, which costs no generation but is not held out.",
    )
    allow_overlap: bool = _setting(False, "Accept probe prompts that are also in the training set.")
    sketch_method: Literal["kronecker", "countsketch"] = _setting(
        "kronecker", "Projection of the gradients; countsketch keeps inner products better and is slower."
    )
    sketch_dim: Annotated[Whole, Field(ge=256)] = _setting(16384, "Dimension of the sketched gradients.")
    max_probe_tokens: AtLeast1 = _setting(
        16384,
        "Tokens, padding included, in one forward and backward pass of the sketch and of the protected direction: the "
        "memory of a refresh grows with it. A longer sample has a pass of its own, which the log names. Generation has "
        "no backward and is bounded by probe_batch_size, or by the training batch of a TRL trainer.",
    )
    probe_batch_size: AtLeast1 = _setting(
        64,
        "Completions generated at once with model.generate, each of at most its prompt and probe_max_new_tokens; TRL "
        "trainers use their own.",
    )
    probe_temperature: Annotated[Real, Field(gt=0)] = _setting(
        1.0, "Sampling temperature with model.generate; TRL trainers use their own."
    )
    probe_max_new_tokens: AtLeast1 = _setting(
        256, "Longest completion with model.generate; TRL trainers use their own."
    )
    failed_refresh_alert: AtLeast1 = _setting(
        3, "Void refreshes in a row after which an alert says that the guard is blind."
    )
    probe_seed: Natural = _setting(0, "Seed of the probe's own randomness; training's is never touched.")
    image_refreshes: Natural = _setting(
        5, "Refreshes between pictures of the kernel and the k curve in TensorBoard, wandb and trackio; 0 sends none."
    )
    progress_bar: bool | None = _setting(None, "Progress bar while probing; None shows it in a terminal only.")

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 reads a bare `yes` as True, which would pass for 1."""
        if isinstance(value, bool) and type(getattr(cls, str(info.field_name))) in (int, float):
            raise ValueError("expected a number, and not true or false")
        return value

    @field_validator("mitigation", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `off` as False."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _samples_reach_k(self) -> GuardConfig:
        if self.num_samples < self.k:
            raise ValueError(
                f"Expected `num_samples` >= k; found num_samples={self.num_samples}, k={self.k}. No unbiased estimate "
                "exists above the number of samples: raise `num_samples` or lower `k`."
            )
        if self.mitigation in ("project", "both") and self.source == "training_batch":
            raise ValueError(
                f"Expected source='held_out' for mitigation={self.mitigation!r}; found 'training_batch'. Its batch "
                "comes in the middle of a step, where no second gradient can be taken: pass held-out prompts as "
                "`probe`, or use mitigation='reweight'."
            )
        if self.resample_refreshes > 1 and self.source == "training_batch":
            raise ValueError(
                f"Expected resample_refreshes=1 for source='training_batch'; found {self.resample_refreshes}. Its "
                "batch costs no sampling that reuse could save: leave it at 1, or pass held-out prompts as `probe`."
            )
        if self.instruments == "change" and self.source == "training_batch":
            raise ValueError(
                "Expected source='held_out' for instruments='change'; found 'training_batch'. Its completions steer "
                "the updates that they would have to measure: pass held-out prompts as `probe`."
            )
        if self.instruments == "change" and self.mitigation != "off":
            raise ValueError(
                f"Expected mitigation='off' for instruments='change'; found {self.mitigation!r}. A floor and a "
                "protected direction come from the angle's samples: use instruments='both'."
            )
        if self.on_loss == "stop" and self.max_loss is None:
            raise ValueError(
                "Expected `max_loss` for on_loss='stop'; found None. Pass the loss to stop at, such as 0.05."
            )
        if self.floor_max > self.k:
            raise ValueError(
                f"Expected `floor_max` <= k; found floor_max={self.floor_max}, k={self.k}. No weight is above k."
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> GuardConfig:
        """Read a YAML or JSON mapping of settings, either the whole file or what stands under `passk_guard:`.

        Raises:
            GuardError: no such file, not a mapping, an unknown setting or a value outside its bounds.
        """
        try:
            return TypeAdapter(cls).validate_python(read_settings(Path(path)))
        except ValidationError as error:
            raise GuardError(f"Settings in {path}: {error}") from error


class _NoSetting:
    """In place of what no setting can be, such as a list: a file may nest without end, and a message with it."""

    def __init__(self, value: Any) -> None:
        self._kind = {list: "a list", dict: "a mapping", int: "a number beyond 64 bits"}.get(
            type(value), "such a value"
        )

    def __repr__(self) -> str:
        return self._kind


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping of settings in a YAML or JSON file, not yet checked.

    Raises:
        GuardError: no such file, none that can be read, neither YAML nor JSON, or not a mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise GuardError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # PyYAML also raises KeyError, AttributeError and others at tags that do not fit
        reason = " ".join(describe_error(error).split())
        raise GuardError(f"Cannot read {path} as {'JSON' if path.suffix == '.json' else 'YAML'}: {reason}") from error
    if isinstance(content, dict) and "passk_guard" in content:
        content = content["passk_guard"]
    if not isinstance(content, dict):
        raise GuardError(f"Expected a mapping of settings in {path}; found {type(content).__name__}.")
    return {_name(name): value if _is_single(value) else _NoSetting(value) for name, value in content.items()}


def _name(name: Any) -> str:
    return one_line(name) if isinstance(name, str) else brief(name)


def _is_single(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**64  # Python refuses to write thousands of digits
    return isinstance(value, (str, float, date, type(None)))


# The guard's settings as a file: its JSON schema, and everything that is wrong with one.


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `GuardConfig`, with the help of each setting as its description."""
    schema = TypeAdapter(GuardConfig).json_schema()
    for field in dataclasses.fields(GuardConfig):
        schema["properties"][field.name]["description"] = field.metadata["help"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def config_problems(path: str | Path) -> list[str]:
    """What keeps a YAML or JSON file from being settings, one line each; empty where nothing does.

    As in `GuardConfig.from_yaml`, the settings are the whole file or what stands under `passk_guard:`.

    Raises:
        GuardError: no such file, none that can be read, neither YAML nor JSON, or not a mapping.
    """
    content = read_settings(Path(path))
    try:
        TypeAdapter(GuardConfig).validate_python(content)
    except ValidationError as error:
        return [_line(problem) for problem in error.errors()]
    return []


def _line(problem: Any) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "unexpected_keyword_argument":
        return f"{name}: unknown setting{_meant(name)}"
    text = problem["msg"].removeprefix("Value error, ")
    if not name:
        return text
    # YAML 1.1 takes off, on, yes and no without quotes for booleans.
    hint = " (quote it in YAML)" if problem["type"] == "literal_error" and isinstance(problem["input"], bool) else ""
    return f"{name}: {text}; found {brief(problem['input'])}{hint}"


def _meant(name: str) -> str:
    known = [field.name for field in dataclasses.fields(GuardConfig)]
    plain = name.lower().replace("-", "_")
    close = [plain] if plain in known else difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
