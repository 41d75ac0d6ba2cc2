"""What an objective of RL with 0/1 rewards does to prompts: its weight on each prompt's gradient, as published."""

from passk_guard.passk.objectives import dr_grpo, grpo, maxrl, named_weighting, passk, passk_training, rloo, rs_grpo
from passk_guard.passk.weighting import Weighting

__all__ = [
    "Weighting",
    "dr_grpo",
    "grpo",
    "maxrl",
    "named_weighting",
    "passk",
    "passk_training",
    "rloo",
    "rs_grpo",
]
