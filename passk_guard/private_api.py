"""Every private or undocumented name of other libraries that is touched here, and what is said when one is gone.

Such a name may go away with any release. Each stands in `TABLE` once, with what it is for, and `check` is called where
its owner is met, at train begin at the latest: a missing name is an error with a remedy and not a wrong result later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from types import MappingProxyType
from typing import Any

from passk_guard.errors import GuardError

_REWEIGHT = "mitigate by `reweight`, which edits no gradient"
_OBSERVE = "take the guard off"
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Seam:
    """Where a library is touched.

    Attributes:
        library: name of its distribution.
        owner: what has the names.
        applies: in which engine or with which trainer.
        instead: what to do without it, for the error.
    """

    library: str
    owner: str
    applies: str
    instead: str


MODULE = Seam("torch", "Module", "any trainer and engine", _OBSERVE)
TENSOR = Seam("torch", "Tensor", "any trainer and engine", _OBSERVE)
GRADIENTS = Seam("torch", "Tensor", "turning gradients on a plain model or DDP", _REWEIGHT)
COMPILED = Seam("torch", "OptimizedModule", "turning gradients of a model under torch.compile", _REWEIGHT)
FSDP = Seam("torch", "FSDPModule", "turning gradients under FSDP2", _REWEIGHT)
FSDP_STATE = Seam("torch", "FSDPState", "turning gradients under FSDP2", _REWEIGHT)
CHECKPOINTED = Seam(
    "transformers",
    "GradientCheckpointingLayer",
    "any trainer of a model that checkpoints activations",
    "set gradient_checkpointing=False",
)
CONFIG = Seam("transformers", "PreTrainedConfig", "`passk_guard.analyze`", "pass `name`")
ACCELERATOR = Seam("accelerate", "Accelerator", "turning gradients on any engine", _REWEIGHT)
LAUNCHED = Seam("accelerate", "Accelerator", "turning gradients under DeepSpeed", _REWEIGHT)
LAUNCHER = Seam("accelerate", "DeepSpeedEngineWrapper", "turning gradients under DeepSpeed", _REWEIGHT)
SAMPLER = Seam(
    "trl",
    "GRPOTrainer or RLOOTrainer",
    "held-out probes sampled by a TRL trainer",
    "pass `sampler=GenerateSampler(model, tokenizer, ...)` or a sampler of your own",
)
BATCH = Seam(
    "trl",
    "GRPOTrainer or RLOOTrainer",
    "PassKObjective and the training batch as probe",
    "pass held-out prompts as `probe` and leave PassKObjective out",
)
ENGINE = Seam("deepspeed", "DeepSpeedEngine", "turning gradients under DeepSpeed", _REWEIGHT)
BF16 = Seam("deepspeed", "BF16_Optimizer", "turning gradients under DeepSpeed's BF16_Optimizer", _REWEIGHT)
ZERO12 = Seam("deepspeed", "DeepSpeedZeroOptimizer", "turning gradients under ZeRO-1 and ZeRO-2", _REWEIGHT)
ZERO12_OFFLOAD = Seam("deepspeed", "DeepSpeedZeroOptimizer", "the same with the optimizer offloaded", _REWEIGHT)
ZERO12_PART = Seam("deepspeed", "gradient tensor", "turning gradients under ZeRO-1 and ZeRO-2", _REWEIGHT)
ZERO3 = Seam("deepspeed", "DeepSpeedZeroOptimizer_Stage3", "turning gradients under ZeRO-3", _REWEIGHT)
ZERO3_OFFLOAD = Seam("deepspeed", "DeepSpeedZeroOptimizer_Stage3", "the same with the optimizer offloaded", _REWEIGHT)
ZERO3_PARAMETERS = Seam("deepspeed", "ZeROOrderedDict", "turning gradients under ZeRO-3", _REWEIGHT)


@dataclass(frozen=True)
class Private:
    """One name.

    Attributes:
        seam: where it is touched.
        name: of the attribute.
        purpose: what it is for here; of an optional one also why its absence does no harm.
        files: of the package, that touch it.
        required: whether its absence would change a result or break a run.
    """

    seam: Seam
    name: str
    purpose: str
    files: tuple[str, ...]
    required: bool


def _rows(
    seam: Seam, files: str, required: Mapping[str, str] = _NOTHING, optional: Mapping[str, str] = _NOTHING
) -> Iterator[Private]:
    for names, needed in ((required, True), (optional, False)):
        yield from (Private(seam, name, purpose, tuple(files.split()), needed) for name, purpose in names.items())


_RESTORED = "put back after a probe"
_CLIPPING = {
    "norm_for_param_grads": "norms to clip by, taken again after an edit",
    "grad_position": "where the gradients of those norms lie",
}

TABLE = (
    *_rows(
        MODULE,
        "isolation.py",
        {
            "_forward_hooks": "counted, to find hooks left behind",
            "_forward_pre_hooks": "counted, to find hooks left behind",
            "_backward_hooks": "counted, to find hooks left behind",
            "_backward_pre_hooks": "counted, to find hooks left behind",
        },
    ),
    *_rows(TENSOR, "isolation.py", {"_version": "finds gradients that a probe wrote into"}),
    *_rows(GRADIENTS, "engines/stand_ins.py", {"_backward_hooks": "hooks on a gradient go along with its stand-in"}),
    *_rows(
        GRADIENTS, "engines/refusals.py", {"_post_accumulate_grad_hooks": "finds optimizers inside the backward pass"}
    ),
    *_rows(
        MODULE,
        "engines/stand_ins.py engines/deepspeed_zero3.py",
        {"_parameters": "stand-ins take the places of parameters; ZeRO-3 has its own dict there"},
    ),
    *_rows(COMPILED, "engines/choose.py", {"_orig_mod": "the module inside the wrapper"}),
    *_rows(FSDP, "engines/fsdp.py", {"_get_fsdp_state": "ends a probe that broke off"}),
    *_rows(FSDP_STATE, "engines/fsdp.py", {"_root_post_backward_final_callback": "ends a probe that broke off"}),
    *_rows(
        CHECKPOINTED,
        "dropout.py isolation.py",
        {"_gradient_checkpointing_func": "checkpoints a probe's activations without dropout"},
    ),
    *_rows(
        CONFIG,
        "analysis/run.py analysis/fingerprint.py",
        optional={"_name_or_path": "names the model in a report, which says its class without"},
    ),
    *_rows(ACCELERATOR, "engines/refusals.py", {"has_lomo_optimizer": "finds optimizers inside the backward pass"}),
    *_rows(
        LAUNCHED,
        "engines/choose.py engines/deepspeed.py",
        {"deepspeed_engine_wrapped": "tells that DeepSpeed holds the gradient"},
    ),
    *_rows(LAUNCHER, "engines/deepspeed.py", {"engine": "the DeepSpeed engine"}),
    *_rows(
        SAMPLER,
        "sampling/trl.py",
        {
            "_tokenize_prompts": "prompts as token ids, as in training",
            "_generate": "its module tells how completions are parsed",
        },
        {"_tokenizer": "parses completions; `processing_class` does so where trl has none"},
    ),
    *_rows(
        SAMPLER, "sampling/trl.py assembly.py", {"_generate_single_turn": "completions, by the trainer's own engine"}
    ),
    *_rows(
        BATCH,
        "objective.py sampling/batch.py",
        {
            "_calculate_rewards": "rewards of the batch",
            "_generate_and_score_completions": "completions and advantages of the batch",
        },
    ),
    *_rows(BATCH, "objective.py", optional={"_logs": "a table of completions, which shows trl's advantages without"}),
    *_rows(
        ENGINE,
        "engines/deepspeed_hook.py engines/deepspeed_probe.py engines/deepspeed_base.py engines/deepspeed_restore.py",
        {
            "step": "the gradient is whole just before it",
            "backward": "probe gradients",
            "optimizer": "holds the gradient",
            "module": "the model",
            "device": "where scalars of all ranks are summed",
            "is_gradient_accumulation_boundary": "the last micro-batch of a step",
            "set_gradient_accumulation_boundary": "a probe is one accumulation window",
        },
    ),
    *(
        row
        for seam in (BF16, ZERO12, ZERO3)
        for row in _rows(seam, "engines/deepspeed_restore.py", {"_backward_hook_state": _RESTORED})
    ),
    *_rows(
        BF16,
        "engines/deepspeed_bf16.py engines/deepspeed_base.py",
        {
            "fp32_groups_gradients_flat": "the gradient",
            "fp32_groups_has_gradients": "whether anything was accumulated",
            "zero_grad": "clears a probe",
        },
    ),
    *_rows(
        ZERO12,
        "engines/deepspeed_zero12.py engines/deepspeed_base.py engines/deepspeed.py",
        {
            "averaged_gradients": "the gradient",
            "micro_step_id": "whether anything was accumulated",
            "bit16_groups": "the parameters",
            "partition_gradients": "stage 1 or 2",
            "dp_process_group": "the ranks that share the data",
            "zero_grad": "clears a probe",
            "cpu_offload": "where the gradient lies",
        },
    ),
    *_rows(
        ZERO12_PART,
        "engines/deepspeed_zero12.py",
        optional={"_zero_padding": "leaves padding out, which is zeros and adds nothing where it is not marked"},
    ),
    *_rows(
        ZERO12_OFFLOAD,
        "engines/deepspeed_offload.py",
        {
            **_CLIPPING,
            "single_partition_of_fp32_groups": "hold the gradient",
            "accumulated_grads_in_cpu": "sums of micro-batches",
        },
    ),
    *_rows(
        ZERO3,
        "engines/deepspeed_zero3.py engines/deepspeed_base.py engines/deepspeed.py",
        {
            "averaged_gradients": "the gradient",
            "grad_partitions_flat_buffer": "the gradient",
            "micro_step_id": "whether anything was accumulated",
            "fp16_groups": "the parameters",
            "parameter_offload": "shards parameters again",
            "persistent_parameters": "gathered at rest",
            "dp_process_group": "the ranks that share the data",
            "zero_grad": "clears a probe",
            "offload_optimizer": "where the gradient lies",
        },
    ),
    *_rows(
        ZERO3,
        "engines/deepspeed_zero3.py",
        {"_epilogue_ran_this_backward": "whether anything was accumulated"},
    ),
    *_rows(
        ZERO3_PARAMETERS,
        "engines/deepspeed_zero3.py",
        optional={"_in_forward": "put back where a probe broke off; some modules and versions have no such mark"},
    ),
    *_rows(
        ZERO3_OFFLOAD,
        "engines/deepspeed_offload.py",
        {**_CLIPPING, "fp32_partitioned_groups_flat": "hold the gradient"},
    ),
)
"""One row for each name at each seam."""


def check(seam: Seam, obj: Any) -> None:
    """Raise GuardError unless `obj`, of the kind `seam.owner` or its class, has the names that are required of it.

    Raises:
        GuardError: with what is missing and why it is needed, the installed version, the supported ones, and what to
            do instead.
        ValueError: nothing is known of this seam.
    """
    rows = [row for row in TABLE if row.seam == seam]
    if not rows:
        raise ValueError(f"Expected a seam of the table; found {seam}.")
    if missing := [row for row in rows if row.required and not _has(obj, row.name)]:
        names = ", ".join(f"`{row.name}` ({row.purpose})" for row in missing)
        found = (obj if isinstance(obj, type) else type(obj)).__name__
        raise GuardError(
            f"Expected a {seam.owner} of {seam.library} {supported(seam.library)} for {seam.applies}; found {found} "
            f"with {seam.library} {installed(seam.library)}, which lacks {names}. Install a supported version of "
            f"{seam.library}, an earlier one if yours is newer than this release of passk_guard, or {seam.instead}."
        )


def is_trl(trainer: Any) -> bool:
    """Whether `trainer` is a GRPOTrainer or RLOOTrainer by name, whatever it has: importing trl takes seconds."""
    return any(kind.__name__ in ("GRPOTrainer", "RLOOTrainer") for kind in type(trainer).__mro__)


def installed(library: str) -> str:
    """Version of a library, or "(not installed)"."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"


def supported(library: str) -> str:
    """Versions that passk-guard asks for, such as ">=1.0", from its metadata; what to look at where it has none."""
    try:
        wanted = requires("passk-guard") or []
    except PackageNotFoundError:
        wanted = []
    ranges = (re.match(rf"{re.escape(library)}\s*([<>=!~][^;]*)", line) for line in wanted)
    return next((match[1].strip() for match in ranges if match), "(versions: pyproject.toml of passk-guard)")


def _has(obj: Any, name: str) -> bool:
    try:
        return hasattr(obj, name)
    except Exception:  # a property that cannot be read now is there all the same
        return True
