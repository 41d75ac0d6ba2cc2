"""Answers of a DeepSpeed engine and its optimizer where nothing unusual is set, for stand-ins of them."""

import torch

ENGINE = {
    "pipeline_parallelism": False,
    "mpu": None,
    "autotp_size": lambda: 0,
    "has_moe_layers": False,
    "zero_hpz_partition_size": lambda: 1,
    "zero_quantized_weights": lambda: False,
    "zero_quantized_gradients": lambda: False,
    "zero_quantized_nontrainable_weights": lambda: False,
    "zero_offload_optimizer": lambda: None,
    "zero_offload_param": lambda: None,
    "zero_partial_offload": lambda: 1.0,
    "zenflow": False,
    "is_deepcompile_enabled": lambda: False,
    "gradient_average": True,
    "enable_backward_allreduce": True,
    "torch_autocast_z0_gradscaler": None,
    "timers": None,
    "tput_timer": None,
}
OPTIMIZER = {"sequence_parallel_size": 1, "master_weights_and_grads_dtype": torch.float32}
