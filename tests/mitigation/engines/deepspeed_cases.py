"""The DeepSpeed configurations in which a guarded run is compared with the oracle."""

SMALL = {"reduce_bucket_size": 100, "allgather_bucket_size": 200}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def case(stage, recipe=None, zero=None, settings=None, **top):
    """Fields of a `Recipe`, a DeepSpeed config and TrainingArguments.

    Persistent parameters are kept rare: by default ZeRO-3 would hold all of a tiny model on every rank.
    """
    persistence = {"stage3_param_persistence_threshold": 60} if stage == 3 else {}
    config = {
        "zero_optimization": {"stage": stage, "overlap_comm": False, **persistence, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        **top,
    }
    return recipe or {}, config, settings or {}


CASES = {f"zero{stage}": case(stage) for stage in (0, 1, 2, 3)}
for stage in (0, 1, 2, 3):
    CASES[f"zero{stage}_sgd"] = case(stage, {"optimizer": "sgd"})
for stage in (1, 2, 3):
    CASES[f"zero{stage}_offload"] = case(stage, zero=OFFLOAD)
    CASES[f"zero{stage}_buckets"] = case(stage, zero=SMALL)
    CASES[f"zero{stage}_overlap"] = case(stage, zero={"overlap_comm": True, "reduce_bucket_size": 500})
    CASES[f"zero{stage}_one_chunk"] = case(stage, {"chunks": 1, "accumulation": 1})
for stage in (2, 3):
    CASES[f"zero{stage}_tied"] = case(stage, {"model": "tied"})
    CASES[f"zero{stage}_lora"] = case(stage, {"model": "lora"})
    CASES[f"zero{stage}_unused"] = case(stage, {"model": "unused", "weight_decay": 0.0})
    CASES[f"zero{stage}_reentrant"] = case(stage, {"model": "tied"}, settings=REENTRANT)
    CASES[f"zero{stage}_non_reentrant"] = case(stage, {"model": "tied"}, settings=NON_REENTRANT)
CASES |= {
    "zero1_reentrant": case(1, settings=REENTRANT),
    "zero2_lora_offload": case(2, {"model": "lora"}, OFFLOAD),
    "zero2_unused_offload": case(2, {"model": "unused", "weight_decay": 0.0}, OFFLOAD),
    "zero2_round_robin": case(2, zero={"round_robin_gradients": True}),
    "zero2_allreduce": case(2, zero={"reduce_scatter": False}),
    "zero2_alignment": case(2, zero={"parameter_alignment": True}),
    "zero2_scattered": case(2, zero={"contiguous_gradients": False}),
    "zero1_scattered": case(1, zero={"contiguous_gradients": False}),
    "zero3_param_offload": case(3, zero=OFFLOAD | {"offload_param": {"device": "cpu", "pin_memory": False}}),
    "zero3_reentrant_lora": case(3, {"model": "lora"}, settings=REENTRANT),
    "zero3_sub_groups": case(3, zero={"sub_group_size": 500}),
}
EXACT = (
    *(f"zero{stage}{suffix}" for stage in (0, 1, 2, 3) for suffix in ("", "_sgd")),
    *(f"zero{stage}_offload" for stage in (1, 2, 3)),
    *(f"zero{stage}_{what}" for stage in (2, 3) for what in ("tied", "lora", "reentrant", "non_reentrant")),
    *("zero1_overlap", "zero2_overlap", "zero3_overlap", "zero2_buckets", "zero3_buckets"),
)
"""Cases in fp32: equal to the oracle up to rounding."""

HARD = tuple(name for name in CASES if name not in EXACT)
"""More of them, in the slow tests."""

BF16 = {"settings": {"bf16": True}, "bf16": {"enabled": True}}
FP16 = {"settings": {"fp16": True}, "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}}
FP32_SUM = {"data_types": {"grad_accum_dtype": "fp32"}}
ROUNDED = {
    "zero1_bf16": case(1, **BF16, **FP32_SUM),
    "zero1_bf16_offload": case(1, zero=OFFLOAD, **BF16, **FP32_SUM),
    "zero2_bf16": case(2, **BF16),
    "zero2_bf16_fp32_sum": case(2, **BF16, **FP32_SUM),
    "zero2_bf16_offload": case(2, zero=OFFLOAD, **BF16, **FP32_SUM),
    "zero3_bf16": case(3, **BF16, **FP32_SUM),
    "zero1_fp16": case(1, **FP16),
    "zero2_fp16": case(2, **FP16),
    "zero2_fp16_offload": case(2, zero=OFFLOAD, **FP16),
    "zero3_fp16": case(3, **FP16),
}
"""Cases in half precision: near the oracle, as near as DeepSpeed is without the guard."""

OVERFLOWING = {
    f"zero{stage}_overflow{suffix}": case(
        stage, zero=zero, settings={"fp16": True}, fp16={"enabled": True, "initial_scale_power": 19}
    )
    for stage in (1, 2, 3)
    for suffix, zero in (("", {}), ("_offload", OFFLOAD))
}

CASES |= ROUNDED | OVERFLOWING
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload", "zero1_bf16")
"""One case of each class of engine and optimizer."""

UNEVEN = ("zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload", "zero2_buckets", "zero3_lora")
"""Cases also run by three processes, where no size is a multiple of their number."""
