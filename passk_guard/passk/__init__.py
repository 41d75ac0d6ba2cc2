"""Closed forms of pass@k, and of other objectives as the weight that each puts on a prompt's gradient."""

from passk_guard.passk.closed_forms import pass_at_k, passk_advantages, passk_weight, unbiased_passk_weight
from passk_guard.passk.max_at_k import max_at_k_advantages
from passk_guard.passk.objectives import (
    dr_grpo,
    grpo,
    maxrl,
    mixture,
    named_weighting,
    passk,
    passk_training,
    rloo,
    rs_grpo,
    surrogate,
    tabulated,
    verl_grpo_passk,
)
from passk_guard.passk.weighting import Weighting

__all__ = [
    "Weighting",
    "dr_grpo",
    "grpo",
    "max_at_k_advantages",
    "maxrl",
    "mixture",
    "named_weighting",
    "pass_at_k",
    "passk",
    "passk_advantages",
    "passk_training",
    "passk_weight",
    "rloo",
    "rs_grpo",
    "surrogate",
    "tabulated",
    "unbiased_passk_weight",
    "verl_grpo_passk",
]
