"""Names of torch, transformers, accelerate and trl."""

from __future__ import annotations

from passk_guard.utils.private_api import seams
from passk_guard.utils.private_api.records import rows

_REFUSED = "completions that are not one turn of the policy are refused; some trainers and versions have none"
_NARROWED = "a sampling distribution that is not the whole softmax is told; a trainer without it has no such setting"

OF_TRAINERS = (
    *rows(
        seams.MODULE,
        "isolation.py",
        {
            "_forward_hooks": "counted, to find hooks left behind",
            "_forward_pre_hooks": "counted, to find hooks left behind",
            "_backward_hooks": "counted, to find hooks left behind",
            "_backward_pre_hooks": "counted, to find hooks left behind",
        },
    ),
    *rows(seams.TENSOR, "isolation.py", {"_version": "finds gradients that a probe wrote into"}),
    *rows(seams.GRADIENTS, "engines/stand_ins.py", {"_backward_hooks": "a stand-in takes hooks along"}),
    *rows(
        seams.GRADIENTS,
        "engines/refusals.py",
        {"_post_accumulate_grad_hooks": "finds optimizers inside the backward pass"},
    ),
    *rows(
        seams.MODULE,
        "engines/stand_ins.py engines/deepspeed_zero3.py",
        {"_parameters": "stand-ins take the places of parameters; ZeRO-3 has its own dict there"},
    ),
    *rows(seams.COMPILED, "engines/choose.py", {"_orig_mod": "the module inside the wrapper"}),
    *rows(seams.FSDP, "engines/fsdp.py", {"_get_fsdp_state": "ends a probe that broke off"}),
    *rows(seams.FSDP_STATE, "engines/fsdp.py", {"_root_post_backward_final_callback": "ends a probe that broke off"}),
    *rows(
        seams.TRAINER,
        "attachment.py reporting/images.py",
        {"callback_handler": "its `callbacks`, to find a guard that was taken off and a second one"},
    ),
    *rows(
        seams.CHECKPOINTED,
        "dropout.py isolation.py",
        {"_gradient_checkpointing_func": "checkpoints a probe's activations without dropout"},
    ),
    *rows(
        seams.CONFIG,
        "analysis/run.py analysis/fingerprint.py",
        optional={"_name_or_path": "names the model in a report, which says its class without"},
    ),
    *rows(
        seams.TENSORBOARD,
        "reporting/images.py",
        optional={"tb_writer": "takes pictures; without it TensorBoard shows the numbers alone"},
    ),
    *rows(
        seams.ACCELERATOR, "engines/refusals.py", {"has_lomo_optimizer": "finds optimizers inside the backward pass"}
    ),
    *rows(seams.ACCELERATOR, "engines/backward.py", {"scaler": "its scale is in every gradient of fp16"}),
    *rows(
        seams.LAUNCHED,
        "engines/choose.py engines/deepspeed.py",
        {"deepspeed_engine_wrapped": "tells that DeepSpeed holds the gradient"},
    ),
    *rows(seams.LAUNCHER, "engines/deepspeed.py", {"engine": "the DeepSpeed engine"}),
    *rows(
        seams.SAMPLER,
        "sampling/trl.py",
        {
            "_tokenize_prompts": "prompts as token ids, as in training",
            "_generate": "its module tells how completions are parsed",
            "temperature": "of the sampling, which the score vectors are taken at",
            "use_vllm": "vLLM schedules by itself, and has a limit of its own",
            "max_completion_length": "what a prompt must leave room for",
        },
        {
            "_tokenizer": "parses completions; `processing_class` does so where trl has none",
            **dict.fromkeys(("use_transformers_continuous_batching", "use_transformers_paged"), _REFUSED),
            **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"), _NARROWED),
        },
    ),
    *rows(
        seams.SAMPLER,
        "sampling/trl.py assembly.py",
        {"_generate_single_turn": "completions, by the trainer's own engine"},
    ),
    *rows(
        seams.SAMPLER,
        "sampling/trl.py sampling/batch.py",
        optional=dict.fromkeys(("tools", "environment_factories", "rollout_func"), _REFUSED),
    ),
    *rows(
        seams.BATCH,
        "objective.py sampling/batch.py",
        {
            "_calculate_rewards": "rewards of the batch",
            "_generate_and_score_completions": "completions and advantages of the batch",
            "num_generations": "completions of a prompt, which stand in a row",
        },
    ),
    *rows(
        seams.BATCH,
        "objective.py assembly.py callback.py",
        {
            "reward_func_names": "find the reward that means correct",
            "reward_funcs": "find the reward that means correct",
        },
    ),
    *rows(seams.BATCH, "objective.py", optional={"_logs": "a table of completions, which shows others without"}),
)
"""One row for each name at each seam."""
