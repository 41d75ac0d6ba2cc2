"""Names of DeepSpeed, whose engine and optimizers document next to none."""

from __future__ import annotations

from passk_guard.utils.private_api import seams
from passk_guard.utils.private_api.records import rows

_RESTORED = "put back after a probe"
_REFUSED = "what was never measured is refused"
_CLIPPING = {
    "norm_for_param_grads": "norms to clip by, taken again after an edit",
    "grad_position": "where the gradients of those norms lie",
}
_SHARDED = {
    "averaged_gradients": "the gradient",
    "micro_step_id": "whether anything was accumulated",
    "dp_process_group": "the ranks that share the data",
    "zero_grad": "clears a probe",
    "loss_scale": "is in every gradient of fp16",
}

OF_DEEPSPEED = (
    *rows(
        seams.ENGINE,
        "engines/deepspeed_hook.py engines/deepspeed_probe.py engines/deepspeed_base.py engines/deepspeed_restore.py",
        {
            "step": "the gradient is whole just before it",
            "backward": "probe gradients",
            "module": "the model",
            "device": "where scalars of all ranks are summed",
            "is_gradient_accumulation_boundary": "the last micro-batch of a step",
            "set_gradient_accumulation_boundary": "a probe is one accumulation window",
            "timers": _RESTORED,
            "tput_timer": _RESTORED,
        },
    ),
    *rows(
        seams.ENGINE,
        "engines/deepspeed.py engines/deepspeed_base.py engines/deepspeed_restore.py",
        {"optimizer": "holds the gradient"},
    ),
    *rows(
        seams.SETTINGS,
        "engines/deepspeed_support.py",
        {
            "pipeline_parallelism": _REFUSED,
            "mpu": _REFUSED,
            "autotp_size": _REFUSED,
            "has_moe_layers": _REFUSED,
            "zero_hpz_partition_size": _REFUSED,
            "zero_quantized_weights": _REFUSED,
            "zero_quantized_gradients": _REFUSED,
            "zero_quantized_nontrainable_weights": _REFUSED,
            "zero_offload_optimizer": _REFUSED,
            "zero_offload_param": _REFUSED,
            "zero_partial_offload": _REFUSED,
            "zenflow": _REFUSED,
            "is_deepcompile_enabled": _REFUSED,
            "gradient_average": _REFUSED,
            "enable_backward_allreduce": _REFUSED,
            "torch_autocast_z0_gradscaler": _REFUSED,
        },
        {"managed_gradient_accumulation": "refused where it is off; older engines always manage it"},
    ),
    *(
        row
        for seam in (seams.BF16, seams.ZERO12, seams.ZERO3)
        for row in (
            *rows(seam, "engines/deepspeed_restore.py", {"_backward_hook_state": _RESTORED}),
            *rows(
                seam,
                "engines/deepspeed_support.py",
                {"optimizer": "Muon is refused", "torch_autocast_gradscaler": _REFUSED},
            ),
        )
    ),
    *(
        row
        for seam in (seams.ZERO12, seams.ZERO3)
        for row in (
            *rows(seam, "engines/deepspeed_restore.py", {"ipg_buckets": _RESTORED}),
            *rows(
                seam,
                "engines/deepspeed_support.py",
                {"sequence_parallel_size": _REFUSED, "master_weights_and_grads_dtype": _REFUSED},
            ),
        )
    ),
    *rows(
        seams.BF16,
        "engines/deepspeed_bf16.py engines/deepspeed_base.py",
        {
            "fp32_groups_gradients_flat": "the gradient",
            "fp32_groups_has_gradients": "whether anything was accumulated",
            "dp_process_group": "the ranks that share the data",
            "zero_grad": "clears a probe",
        },
    ),
    *rows(
        seams.ZERO12,
        "engines/deepspeed_zero12.py engines/deepspeed_base.py engines/deepspeed.py",
        {
            **_SHARDED,
            "bit16_groups": "the parameters",
            "partition_gradients": "stage 1 or 2",
            "cpu_offload": "where the gradient lies",
        },
    ),
    *rows(
        seams.ZERO12_PART,
        "engines/deepspeed_zero12.py",
        optional={"_zero_padding": "leaves padding out, which is zeros and adds nothing where it is not marked"},
    ),
    *rows(
        seams.ZERO12_OFFLOAD,
        "engines/deepspeed_offload.py",
        {
            **_CLIPPING,
            "single_partition_of_fp32_groups": "hold the gradient",
            "accumulated_grads_in_cpu": "sums of micro-batches",
        },
    ),
    *rows(
        seams.ZERO3,
        "engines/deepspeed_zero3.py engines/deepspeed_offload.py engines/deepspeed_base.py engines/deepspeed.py",
        {
            **_SHARDED,
            "grad_partitions_flat_buffer": "the gradient",
            "fp16_groups": "the parameters",
            "parameter_offload": "shards parameters again",
            "persistent_parameters": "gathered at rest",
            "offload_optimizer": "where the gradient lies",
        },
    ),
    *rows(
        seams.ZERO3,
        "engines/deepspeed_zero3.py",
        {"_epilogue_ran_this_backward": "whether anything was accumulated"},
    ),
    *rows(
        seams.ZERO3_SHARDER, "engines/deepspeed_zero3.py", {"partition_all_parameters": "after a probe that broke off"}
    ),
    *rows(
        seams.ZERO3_PARAMETER,
        "engines/deepspeed_zero3.py",
        {"ds_status": "whether it is gathered at rest", "all_gather": "after a probe that broke off"},
    ),
    *rows(seams.ZERO3_SHAPE, "sketch/plan.py", {"ds_shape": "the shape of a weight that is empty outside a forward"}),
    *rows(
        seams.ZERO3_UNLESS,
        "engines/zero3_trace.py",
        optional={
            "optimizer": "other engines have none, or another",
            "parameter_offload": "other optimizers have none",
        },
    ),
    *rows(seams.ZERO3_TRACER, "engines/zero3_trace.py", {"get_param_coordinator": "the order it gathers weights in"}),
    *rows(
        seams.ZERO3_TRACE,
        "engines/zero3_trace.py",
        {"is_invalid_trace": "whether there is an order", "_invalidate_trace": "the order of a probe is forgotten"},
    ),
    *rows(
        seams.ZERO3_PARAMETERS,
        "engines/deepspeed_zero3.py",
        optional={"_in_forward": "put back where a probe broke off; some modules and versions have no such mark"},
    ),
    *rows(
        seams.ZERO3_OFFLOAD,
        "engines/deepspeed_offload.py",
        {**_CLIPPING, "fp32_partitioned_groups_flat": "hold the gradient"},
    ),
)
"""One row for each name at each seam."""
