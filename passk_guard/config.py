"""Every setting of the guard, with its bounds and its help, from Python, YAML, JSON or a command line (TrlParser)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief, describe_error, one_line


def _setting(default: Any, text: str, **more: Any) -> Any:
    # HfArgumentParser hands everything in the metadata to argparse, so the bounds are in the annotations instead.
    return dataclasses.field(default=default, metadata={"help": text}, **more)


_LARGEST = 2**31 - 1  # what torch and the seeds made of these numbers can hold
Whole = Annotated[int, Field(le=_LARGEST)]
AtLeast1 = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, lt=1)]
_NUMBERS = re.compile(r"\b(Whole|AtLeast1|Natural|Real|Share)\b")


def _no_switch_for_a_number(cls: Any, value: Any, info: ValidationInfo) -> Any:
    """YAML 1.1 reads a bare `yes` as True, which would pass for 1."""
    if isinstance(value, bool) and _NUMBERS.search(cls.__annotations__[str(info.field_name)]):
        raise ValueError("expected a number, and not true or false")
    return value


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Advanced:
    """Settings that only a developer of the guard would turn: `GuardConfig(advanced=Advanced(...))`.

    Raises:
        pydantic.ValidationError (a ValueError): a value outside its bounds, or an unknown name.
    """

    alert_rule: Literal["whole_run", "each_look"] = _setting(
        "whole_run",
        "When the verdict becomes CONFLICT. whole_run: when the evidence of all refreshes establishes a conflict, with "
        "a chance of at most 1 - confidence of any false alert in the run. each_look: when `patience` consecutive "
        "refreshes establish one, each by itself.",
    )
    gate_confidence: Annotated[Real, Field(gt=0.5, lt=1)] = _setting(
        0.8413,
        "One-sided confidence in a conflict that opens the gate of gate=conflict. The default is one standard error.",
    )
    protected_average: Share = _setting(
        0.0, "Weight of the past in the exponential average of the protected gradient over refreshes."
    )
    floor_average: Share = _setting(
        0.8, "Weight of the past in the average of the floor over refreshes. Without one the floor falls too early."
    )

    _numbers = field_validator("*", mode="before")(classmethod(_no_switch_for_a_number))

    @model_validator(mode="before")
    @classmethod
    def _from_a_command_line(cls, given: Any) -> Any:
        """`--advanced '{"gate_confidence": 0.9}'` arrives as one text."""
        text = given.args[0] if isinstance(given, ArgsKwargs) and given.args else given
        return json.loads(text) if isinstance(text, str) else given


_RENAMED = {field.name: f"advanced.{field.name}" for field in dataclasses.fields(Advanced)}
_RENAMED |= {"void_alert": "failed_refresh_alert"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GuardConfig:
    """Settings of `PassKGuardCallback`.

    Raises:
        pydantic.ValidationError (a ValueError): a value outside its bounds, k above num_samples, an unknown name, or
            a name of an earlier version, with the new one.
    """

    k: Annotated[Whole, Field(ge=2)] = _setting(8, "The k of pass@k whose gradient is watched.")
    probe_prompts: Annotated[Whole, Field(ge=3)] | None = _setting(
        None,
        "Probe prompts of each refresh, over all ranks. None takes 64, or fewer (at least 16) where `overhead` has no "
        "room for 8 refreshes of 64 in the run.",
    )
    num_samples: Annotated[Whole, Field(ge=2)] = _setting(16, "Completions sampled for each probe prompt, at least k.")
    overhead: Annotated[Real, Field(gt=0, le=100)] = _setting(
        0.1,
        "Work of the probe over that of training: a refresh begins when those before it are at most so much. Work is "
        "tokens, padding included: 1 for a forward pass, 3 with the backward pass, 4 for sampling.",
    )
    refresh_steps: AtLeast1 | None = _setting(
        None, "Optimizer steps between two refreshes, whatever they cost. None leaves it to `overhead`."
    )
    pool_refreshes: AtLeast1 = _setting(
        3, "Newest refreshes whose statistics are averaged. Completions that served several of them count once."
    )
    resample_refreshes: AtLeast1 = _setting(
        1,
        "Refreshes for which one sample of completions is used. The first one samples and scores them. The others "
        "reweight them to the current policy. 1 samples at every refresh. Patience, cooldown and the evidence of the "
        "run count only refreshes that sample. Saving a checkpoint also ends a sample.",
    )
    min_effective_samples: Annotated[Real, Field(gt=0, le=1)] = _setting(
        0.8,
        "Effective sample size, as a share of the completions, below which a refresh samples new ones. A smaller share "
        "is as unbiased and finds fewer conflicts.",
    )
    threshold: Annotated[Real, Field(gt=-1, lt=1)] = _setting(0.0, "Cosine below which the two gradients conflict.")
    confidence: Annotated[Real, Field(gt=0.5, lt=1)] = _setting(0.95, "Confidence of the interval and of the verdict.")
    patience: AtLeast1 = _setting(
        2,
        "Consecutive refreshes that must agree before the verdict changes. CONFLICT needs none under "
        "advanced.alert_rule=whole_run.",
    )
    cooldown: AtLeast1 = _setting(
        3, "Consecutive refreshes without an established conflict after which CONFLICT is cleared."
    )
    mitigation: Literal["off", "hold", "project", "reweight", "both", "auto"] = _setting(
        "off",
        "What is done about a conflict. off: nothing. hold: add lambda times the pass@1 advantages to those of "
        "training, with lambda set by the measured change of pass@1, so that pass@1 keeps its level. A trainer "
        "without advantages has lambda |g|/|p| p added to its gradient g. project: before clipping and the optimizer, "
        "change the training gradient g as little as possible so that <g, p> >= gamma |g||p|, with |g| as before and p "
        "the probe's pass@1 gradient. reweight: solve for a floor under the prompt weights of the PassKObjective, and "
        "change no gradient. both: do both. auto: hold where the trainer computes advantages and the change of pass@1 "
        "is measured, else reweight if a PassKObjective is installed, else project.",
    )
    hold_metric: str = _setting(
        "pass@1",
        "What hold keeps: pass@1, or the mean of the reward function of the trainer that has this name. A reward that "
        "is not trained on has the weight 0 in the trainer's `reward_weights`.",
    )
    hold_tolerance: Annotated[Real, Field(ge=0)] = _setting(
        0.0, "Loss below its level that hold accepts, such as 0.01 of pass@1, in the units of hold_metric."
    )
    hold_level: Real | None = _setting(
        None,
        "Level on the probe that hold keeps, such as 0.6, in the units of hold_metric. None keeps that at the start.",
    )
    gamma: Share = _setting(
        0.2,
        "Least <g, p> after project, as a share of |g||p| before. 0 removes the conflict without protecting pass@1.",
    )
    gate: Literal["always", "conflict"] = _setting(
        "always",
        "When project enforces the constraint. always: at every step. conflict: only while the newest estimate is in "
        "conflict at advanced.gate_confidence. The cosine becomes positive again only after pass@1 has been damaged, "
        "so conflict protects less.",
    )
    protected_dtype: Literal["float32", "bfloat16"] = _setting(
        "float32", "Dtype in which the protected gradient is kept. bfloat16 halves its memory."
    )
    floor_gamma: Share = _setting(0.2, "Cosine to the pass@1 gradient for which reweight solves for the floor.")
    floor_max: Annotated[Real, Field(gt=0)] = _setting(
        1.0, "Largest floor. 1 is the weight that pass@1 gives every prompt. k would turn the run into one on pass@1."
    )
    correct_threshold: Real = _setting(1.0, "Rewards at or above it count as correct.")
    verifier_timeout: Annotated[Real, Field(ge=0)] = _setting(
        300.0,
        "Seconds allowed for scoring the completions of one refresh on one rank. A reward function that takes longer "
        "is stopped, and the refresh fails. With several ranks at most half of ddp_timeout applies. 0 sets no limit.",
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
    cluster_by: str | None = _setting(
        None,
        "Column of the probe that prompts share which are not independent: a template, a source problem. Those of one "
        "value are not paired with one another, and count as one draw in every error. None: all are independent.",
    )
    on_loss: Literal["alert", "stop"] = _setting(
        "alert",
        "What follows when the loss of pass@1 is established to exceed max_loss: an alert alone, or the end of "
        "training too.",
    )
    max_loss: Annotated[Real, Field(gt=0, lt=1)] | None = _setting(
        None,
        "Largest loss of pass@1 since the start that is accepted, such as 0.05. Beyond it there is one alert, and what "
        "on_loss says. None accepts any.",
    )
    source: Literal["held_out", "training_batch"] = _setting(
        "held_out",
        "Where the completions come from. held_out: sampled from the probe set. training_batch: the batch that a "
        "GRPO or RLOO trainer has just generated, which costs no generation but is not held out.",
    )
    allow_overlap: bool = _setting(False, "Accept probe prompts that are also in the training set.")
    sketch_method: Literal["kronecker", "countsketch"] = _setting(
        "kronecker", "Projection of the gradients. countsketch preserves inner products better and is slower."
    )
    sketch_dim: Annotated[Whole, Field(ge=256)] = _setting(16384, "Dimension of the sketched gradients.")
    max_probe_tokens: AtLeast1 | None = _setting(
        None,
        "Tokens, padding included, in one forward and backward pass of the sketch and of the protected direction. The "
        "memory of a refresh grows with it. None chooses 512 to 16384 from the memory that is free when a run begins, "
        "and keeps to it in a resumed run. A longer completion gets a separate pass, which the log reports. Generation "
        "is bounded by probe_batch_size instead, or by the training batch of a TRL trainer.",
    )
    probe_batch_size: AtLeast1 = _setting(64, "Completions per call of model.generate. TRL trainers use their own.")
    probe_temperature: Annotated[Real, Field(gt=0)] = _setting(
        1.0, "Sampling temperature of model.generate. TRL trainers use their own."
    )
    probe_max_new_tokens: AtLeast1 = _setting(256, "Most tokens per completion. TRL trainers use their own number.")
    failed_refresh_alert: AtLeast1 = _setting(
        3, "Consecutive failed refreshes after which an alert reports that there is no valid refresh."
    )
    probe_seed: Natural = _setting(0, "Seed of the probe. The random state of training is never changed.")
    image_refreshes: Natural = _setting(
        5, "Refreshes between pictures of the kernel and the k curve in TensorBoard, wandb and trackio. 0 sends none."
    )
    progress_bar: bool | None = _setting(None, "Show a progress bar while probing. None shows it in a terminal only.")
    verbosity: Literal["normal", "quiet"] = _setting(
        "normal",
        "normal: also one line at the start, one at the first refresh, one where the pool is full and cannot tell, and "
        "a summary at the end. quiet: changes of the verdict, alerts and warnings alone.",
    )
    alert_webhook: Annotated[str, Field(pattern=r"^https?://[^\s/]+")] | None = _setting(
        None,
        "Address that each alert is posted to as JSON with a `text`, which Slack and others take. It is written into "
        "no file and no tracker.",
        repr=False,
    )
    advanced: Advanced = _setting(Advanced(), "Settings for developers of the guard, as a mapping or as JSON.")

    _numbers = field_validator("*", mode="before")(classmethod(_no_switch_for_a_number))

    @field_validator("mitigation", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `off` as False."""
        return "off" if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _no_earlier_names(cls, given: Any) -> Any:
        names = given.kwargs if isinstance(given, ArgsKwargs) else given
        if isinstance(names, Mapping) and (found := _renamed(names)):
            raise ValueError("; ".join(found))
        return given

    @model_validator(mode="after")
    def _fit_together(self) -> GuardConfig:
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
        if self.cluster_by is not None and self.source == "training_batch":
            raise ValueError(
                f"Expected cluster_by=None for source='training_batch'; found {self.cluster_by!r}. Its rows are not "
                "the probe's: pass held-out prompts as `probe`."
            )
        if self.instruments == "change" and self.source == "training_batch":
            raise ValueError(
                "Expected source='held_out' for instruments='change'; found 'training_batch'. Its completions steer "
                "the updates that they would have to measure: pass held-out prompts as `probe`."
            )
        if self.instruments == "change" and self.mitigation not in ("off", "hold"):
            raise ValueError(
                f"Expected mitigation='off' or 'hold' for instruments='change'; found {self.mitigation!r}. A floor and "
                "a protected direction come from the angle's samples: use instruments='both'."
            )
        if self.mitigation == "hold" and (self.source == "training_batch" or self.instruments == "angle"):
            raise ValueError(
                "Expected source='held_out' and instruments='both' or 'change' for mitigation='hold', which follows "
                f"the measured change of pass@1; found {self.source!r} and {self.instruments!r}."
            )
        if self.hold_metric != "pass@1" and self.mitigation != "hold":
            raise ValueError(
                f"Expected mitigation='hold' for hold_metric={self.hold_metric!r}; found {self.mitigation!r}, which "
                "protects pass@1 alone."
            )
        rate = self.hold_level is None or 0 < self.hold_level < 1
        if self.hold_metric == "pass@1" and not (rate and self.hold_tolerance < 1):
            raise ValueError(
                f"Expected `hold_tolerance` < 1 and 0 < `hold_level` < 1, as pass@1 is a rate; found "
                f"hold_tolerance={self.hold_tolerance}, hold_level={self.hold_level}."
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
    def of(cls, config: GuardConfig | Mapping[str, Any] | str | Path | None = None, **settings: Any) -> GuardConfig:
        """What a user passes as settings: a GuardConfig, a mapping or a YAML or JSON file, with `settings` over it.

        Raises:
            GuardError: something else, or settings that are unknown, out of bounds or do not fit, one by one.
        """
        if isinstance(config, cls) and not settings:
            return config
        if isinstance(config, (str, Path)):
            given = read_settings(Path(config))
        elif config is None or isinstance(config, Mapping):
            given = dict(config or {})
        elif isinstance(config, cls):
            given = {name: getattr(config, name) for name in _names(cls)}
        else:
            raise GuardError(
                f"Expected `config` to be a GuardConfig, a mapping or the path of a YAML file; found "
                f"{type(config).__name__}. Settings can also be keywords, such as k=8."
            )
        given |= settings
        if problems := _problems(given):
            raise GuardError("; ".join(problems))
        return TypeAdapter(cls).validate_python(given)

    @property
    def shown(self) -> dict[str, Any]:
        """The settings for a journal or a tracker: all but the address of the webhook, which lets who has it post."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "alert_webhook"}

    @classmethod
    def from_yaml(cls, path: str | Path) -> GuardConfig:
        """Read a YAML or JSON mapping of settings: the whole file, or its part under `passk_guard:`.

        Raises:
            GuardError: no such file, not a mapping, an unknown setting or a value outside its bounds.
        """
        try:
            return TypeAdapter(cls).validate_python(read_settings(Path(path)))
        except ValidationError as error:
            raise GuardError(f"Settings in {path}: {error}") from error

    @classmethod
    def from_journal(cls, settings: Mapping[str, Any]) -> GuardConfig:
        """Read the settings in a run's journal, of any version; those that this version does not know are left out.

        Raises:
            pydantic.ValidationError: a value outside its bounds.
        """
        nested = settings.get("advanced")
        values = {**settings, **(nested if isinstance(nested, Mapping) else {})}
        values = {_RENAMED.get(name, name).removeprefix("advanced."): value for name, value in values.items()}
        advanced = {name: values[name] for name in _names(Advanced) if name in values}
        known = {name: values[name] for name in _names(cls) if name in values}
        return cls(**known | {"advanced": Advanced(**advanced)})


def read_settings(path: Path) -> dict[str, Any]:
    """Read the mapping of settings in a YAML or JSON file, not yet checked.

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
    return {one_line(str(name)): value for name, value in content.items()}


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `GuardConfig`, with the help of each setting as its description."""
    schema = TypeAdapter(GuardConfig).json_schema()
    for kind, part in ((GuardConfig, schema), (Advanced, schema["$defs"]["Advanced"])):
        for field in dataclasses.fields(kind):
            part["properties"][field.name]["description"] = field.metadata["help"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def config_problems(path: str | Path) -> list[str]:
    """List what keeps a YAML or JSON file from being settings, one line each; empty where nothing does.

    As in `GuardConfig.from_yaml`, the settings are the whole file or its part under `passk_guard:`.

    Raises:
        GuardError: no such file, none that can be read, neither YAML nor JSON, or not a mapping.
    """
    return _problems(read_settings(Path(path)))


def _problems(content: Mapping[str, Any]) -> list[str]:
    problems = _renamed(content)
    try:
        TypeAdapter(GuardConfig).validate_python({k: v for k, v in content.items() if k not in _RENAMED})
    except ValidationError as error:
        problems += [_line(problem) for problem in error.errors()]
    return problems


def _renamed(names: Iterable[str]) -> list[str]:
    """One message for each name of an earlier version."""
    messages = {name: f"{name}: this setting is now `{_RENAMED[name]}`" for name in names if name in _RENAMED}
    how = ", in Python GuardConfig(advanced=Advanced({0}=...)), in YAML `advanced: {{{0}: ...}}`"
    return [text + (how.format(name) if "advanced." in text else "") for name, text in messages.items()]


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
    advanced = [f"advanced.{known}" for known in _names(Advanced)]
    known = {full.rpartition(".")[2]: full for full in [*_names(GuardConfig), *advanced]}
    plain = name.rpartition(".")[2].lower().replace("-", "_")
    close = [plain] if plain in known else difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(known[one] for one in close)}?" if close else ""


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
