"""The advantages of GRPO, Dr. GRPO and RLOO: rewards against their group's mean."""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.objectives.weighting import Weighting, centred, check_finite, shortest
from passk_guard.utils.errors import GuardError

TRL_EPSILON = 1e-4


def grpo(epsilon: float = TRL_EPSILON) -> Weighting:
    r"""GRPO: the reward's distance from the group mean in standard deviations.

    $A = (r - \bar r) / (\sigma + \epsilon)$ with $\sigma^2 = \frac{n}{n-1} \bar r (1 - \bar r)$, as TRL's GRPOTrainer
    computes it with `scale_rewards="group"` (its default): the unbiased standard deviation, epsilon = 1e-4.
    Population weight $1 / (\sqrt{p(1-p)} + \epsilon)$: prompts that nearly always fail and those that nearly always
    pass weigh the most, and none less than about 2. With n samples the weight stops at about sqrt(n) at either end.
    Sources: arXiv 2402.03300, Sec. 4.1 (the advantage, whose standard deviation it does not say how to estimate);
    trl/trainer/grpo_trainer.py.

    Args:
        epsilon: > 0. verl adds 1e-6.

    Raises:
        GuardError: epsilon not finite or not positive.
    """
    check_finite("epsilon", epsilon)
    if epsilon <= 0:
        raise GuardError(f"Expected `epsilon` > 0; found {epsilon}.")

    def scale(n: Tensor, c: Tensor) -> Tensor:
        return 1 / ((c * (n - c) / (n * (n - 1))).sqrt() + epsilon)

    name = "grpo" if epsilon == TRL_EPSILON else f"grpo:epsilon={shortest(epsilon)}"
    return centred(name, scale, lambda p: 1 / ((p * (1 - p)).sqrt() + epsilon))


def dr_grpo() -> Weighting:
    r"""Dr. GRPO: the reward less the group mean, no scaling.

    $A = r - \bar r$. Population weight 1: pass@1 itself. The mean holds the sample's own reward, so that n samples
    give the weight (n-1)/n, the same for every prompt. TRL's GRPOTrainer with `scale_rewards="none"`.
    Source: arXiv 2503.20783, Sec. 3; its removal of length normalisation is not an advantage and not here.
    """
    return centred("dr_grpo", lambda n, c: torch.ones_like(n + c), torch.ones_like)


def rloo() -> Weighting:
    r"""RLOO: the reward less the mean reward of the *other* samples.

    $A_i = r_i - \frac{1}{n-1} \sum_{j \ne i} r_j = \frac{n}{n-1}(r_i - \bar r)$. Weight exactly 1 for every p and n:
    unbiased for pass@1. TRL's RLOOTrainer with `normalize_advantages=False` (its default) and `beta=0`; its KL
    penalty is a part of the reward, and a reward with it in is not 0/1.
    Source: arXiv 2402.14740.
    """
    return centred("rloo", lambda n, c: n / (n - 1) * torch.ones_like(c), torch.ones_like)
