"""The places where private or undocumented names of other libraries are touched."""

from __future__ import annotations

from passk_guard.utils.private_api.records import Seam

_REWEIGHT = "mitigate by `reweight`, which edits no gradient"
_OBSERVE = "take the guard off"

MODULE = Seam("torch", "Module", "any trainer and engine", _OBSERVE)
TENSOR = Seam("torch", "Tensor", "any trainer and engine", _OBSERVE)
GRADIENTS = Seam("torch", "Tensor", "turning gradients on a plain model or DDP", _REWEIGHT)
COMPILED = Seam("torch", "OptimizedModule", "turning gradients of a model under torch.compile", _REWEIGHT)
FSDP = Seam("torch", "FSDPModule", "turning gradients under FSDP2", _REWEIGHT)
FSDP_STATE = Seam("torch", "FSDPState", "turning gradients under FSDP2", _REWEIGHT)
TRAINER = Seam("transformers", "Trainer", "any trainer and engine", _OBSERVE)
CHECKPOINTED = Seam(
    "transformers",
    "GradientCheckpointingLayer",
    "any trainer of a model that checkpoints activations",
    "set gradient_checkpointing=False",
)
CONFIG = Seam("transformers", "PreTrainedConfig", "`passk_guard.analyze`", "pass `name`")
TENSORBOARD = Seam("transformers", "TensorBoardCallback", "pictures in TensorBoard", "set image_refreshes=0")
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
SETTINGS = Seam("deepspeed", "DeepSpeedEngine", "telling what was never measured under DeepSpeed", _REWEIGHT)
BF16 = Seam("deepspeed", "BF16_Optimizer", "turning gradients under DeepSpeed's BF16_Optimizer", _REWEIGHT)
ZERO12 = Seam("deepspeed", "DeepSpeedZeroOptimizer", "turning gradients under ZeRO-1 and ZeRO-2", _REWEIGHT)
ZERO12_OFFLOAD = Seam("deepspeed", "DeepSpeedZeroOptimizer", "the same with the optimizer offloaded", _REWEIGHT)
ZERO12_PART = Seam("deepspeed", "gradient tensor", "turning gradients under ZeRO-1 and ZeRO-2", _REWEIGHT)
ZERO3 = Seam("deepspeed", "DeepSpeedZeroOptimizer_Stage3", "turning gradients under ZeRO-3", _REWEIGHT)
ZERO3_OFFLOAD = Seam("deepspeed", "DeepSpeedZeroOptimizer_Stage3", "the same with the optimizer offloaded", _REWEIGHT)
ZERO3_SHARDER = Seam("deepspeed", "DeepSpeedZeRoOffload", "turning gradients under ZeRO-3", _REWEIGHT)
ZERO3_PARAMETER = Seam("deepspeed", "sharded parameter", "turning gradients under ZeRO-3", _REWEIGHT)
ZERO3_SHAPE = Seam("deepspeed", "sharded parameter", "any trainer under ZeRO-3", "use ZeRO-2")
ZERO3_TRACER = Seam("deepspeed", "DeepSpeedZeRoOffload", "any trainer under ZeRO-3", "use ZeRO-2")
ZERO3_UNLESS = Seam("deepspeed", "DeepSpeedEngine and its optimizer", "any trainer under ZeRO-3", "use ZeRO-2")
ZERO3_TRACE = Seam("deepspeed", "PartitionedParameterCoordinator", "any trainer under ZeRO-3", "use ZeRO-2")
ZERO3_PARAMETERS = Seam("deepspeed", "ZeROOrderedDict", "turning gradients under ZeRO-3", _REWEIGHT)
