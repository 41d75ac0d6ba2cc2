"""What the benchmark compares: the arms (how a run is guarded) and the settings (what run it is).

Left out: any private training loop. Every arm is TRL's GRPOTrainer with the objective or the callback a user would add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from examples.interference.task import MIXTURE, correct, make_prompts
from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective, ProbeSet, combine, passk_advantages
from passk_guard.mitigation.gradient_guard import StepGuard


@dataclass(frozen=True)
class Setting:
    """A run: its objective pass@k from n samples a prompt, its length, its optimizer and its prompts.

    Attributes:
        trainer: fields of GRPOConfig.
        probe: fields of GuardConfig.
    """

    title: str
    k: int = 8
    steps: int = 60
    trainer: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    mixture: dict[str, float] = field(default_factory=lambda: MIXTURE)
    cue: bool = True


PROBE = {"probe_prompts": 64, "refresh_steps": 5}
"""Of every arm, whatever it costs: arms that differ are compared at the same refreshes."""

SETTINGS = {
    "main": Setting("k=8, n=16, SGD, 180 steps", steps=180),
    "adamw": Setting("k=8, n=16, AdamW 1e-4, 60 steps", trainer={"optim": "adamw_torch", "learning_rate": 1e-4}),
    "k4": Setting(
        "k=4, n=8, SGD, 60 steps",
        k=4,
        trainer={"num_generations": 8},
        probe={"probe_prompts": 128, "num_samples": 8},
    ),
    "control": Setting("no hard prompts, so no conflict; SGD, 60 steps", mixture={"easy": 0.7, "neutral": 0.3}),
    "irreducible": Setting("no cue in the prompt, so no way out; SGD, 60 steps", cue=False),
}


class MixedObjective(PassKObjective):
    """share grad J_1 + (1 - share) grad J_k, a fixed mixture of the two objectives."""

    def __init__(self, trainer: GRPOTrainer, k: int, *, share: float, **bounds: float | None) -> None:
        super().__init__(trainer, k, **bounds)
        self.share = share

    def advantages(self, rewards: Tensor, num_generations: int) -> Tensor:
        right = (rewards.view(-1, num_generations) >= self.threshold).float()
        mixed = self.share * passk_advantages(right, 1) + (1 - self.share) * passk_advantages(right, self.k)
        return mixed.view(-1)


class ShortestStep(StepGuard):
    """MGDA by torchjd in place of the projection: g <- w_0 g + w_1 p, the shortest vector between the two.

    TRL's loss is divided by the length of a completion and the protected gradient is not, so p is divided here: MGDA
    depends on the lengths of its gradients.
    """

    def _project(self, protected: list[Tensor]) -> None:
        gradient, length = self.engine.gradient(), 5
        p = [part / length for part in protected]
        gg, gp, pp = self.engine.inner_products([(gradient, gradient), (gradient, p), (p, p)])
        w_g, w_p = combine(torch.tensor([[gg, gp], [gp, pp]], dtype=torch.float64), "mgda").tolist()
        self.engine.add_(gradient, w_g - 1)
        self.engine.add_(p, w_p)


class ShortestStepCallback(PassKGuardCallback):
    """The guard with MGDA as its rule; always on, as MGDA knows no gate."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._mitigator.steps.__class__ = ShortestStep


@dataclass(frozen=True)
class Arm:
    """How a run is guarded.

    Attributes:
        label: for tables and pictures.
        guard: fields of GuardConfig; None for a run without the callback.
        objective: makes the objective of the run.
        callback: class of the guard.
    """

    label: str
    guard: dict[str, Any] | None = None
    objective: Callable[..., PassKObjective] = PassKObjective
    callback: type[PassKGuardCallback] = PassKGuardCallback

    def prepare(self, trainer: GRPOTrainer, setting: Setting) -> PassKGuardCallback | None:
        """Add the guard as a user would."""
        if self.guard is None:
            return None
        seed = trainer.args.seed
        probe = ProbeSet.from_list(make_prompts("probe", 2048, seed, setting.mixture, cue=setting.cue))
        config = GuardConfig(**(PROBE | {"k": setting.k, "probe_seed": seed} | setting.probe | self.guard))
        guard = self.callback(trainer, probe=probe, correct=correct, config=config)
        trainer.add_callback(guard)
        return guard


def _on_pass_at_1(trainer: GRPOTrainer, k: int, **bounds: float | None) -> PassKObjective:
    return PassKObjective(trainer, k=1, **bounds)


def _bounded(trainer: GRPOTrainer, k: int, *, low: float | None = None, high: float | None = None, **_: object):
    return PassKObjective(trainer, k=k, floor=low, cap=high)


def mixed(share: float) -> Arm:
    """A fixed mixture with this share of J_1."""
    return Arm(f"{share:g} J_1 + {1 - share:g} J_k", objective=partial(MixedObjective, share=share))


ARMS = {
    "none": Arm("no guard"),
    "project": Arm("project, gamma 0.2", {"mitigation": "project"}),
    "hold": Arm("hold pass@1", {"mitigation": "hold"}),
    "hold_level": Arm("hold pass@1 at 0.69", {"mitigation": "hold", "hold_level": 0.69}),  # .08 above the warm starts
    "reweight": Arm("reweight, floor solved", {"mitigation": "reweight"}),
    "floor": Arm("fixed floor 0.5", objective=partial(_bounded, low=0.5)),
    "pcgrad": Arm("project, gamma 0 (PCGrad, A-GEM)", {"mitigation": "project", "gamma": 0.0}),
    "both": Arm("both", {"mitigation": "both"}),
    "cap": Arm("fixed cap 2", objective=partial(_bounded, high=2.0)),
    "mixture": mixed(0.3),  # chosen on a seed of its own: choose_mixture.py
    "mgda": Arm("MGDA (torchjd)", {"mitigation": "project", "gate": "always"}, callback=ShortestStepCallback),
    "pass_at_1": Arm("train on J_1", objective=_on_pass_at_1),
}
CORE = ("none", "hold", "project", "reweight", "floor")
"""The arms that every setting is run with, on more seeds than the others."""
