"""What an objective of RL with 0/1 rewards does to prompts: its weight on each prompt's gradient, as published."""

from passk_guard.objectives.group_relative import dr_grpo, grpo, rloo
from passk_guard.objectives.names import named_weighting
from passk_guard.objectives.subsets import passk, passk_training
from passk_guard.objectives.utility import maxrl, rs_grpo
from passk_guard.objectives.weighting import Weighting

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
