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

from examples.interference.exact import success_probability
from examples.interference.task import MIXTURE, correct, make_prompts
from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective, ProbeSet, combine, named_weighting
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


class WeightedObjective(PassKObjective):
    """The advantages of a named weighting, times `scale`; {k} in its spec is the setting's k."""

    def __init__(self, trainer: GRPOTrainer, k: int, *, spec: str, scale: float = 1.0, **bounds: float | None) -> None:
        super().__init__(trainer, k, **bounds)
        self.weighting, self.scale = named_weighting(spec.format(k=k)), scale

    def advantages(self, rewards: Tensor, num_generations: int) -> Tensor:
        right = rewards.view(-1, num_generations) >= self.threshold
        of_right, of_wrong = self.weighting.coefficients(torch.tensor(num_generations), right.sum(1, keepdim=True))
        return (self.scale * num_generations * torch.where(right, of_right, of_wrong)).float().view(-1)


class AnnealedObjective(PassKObjective):
    """k falls linearly from its start to 1 over the run, rounded, which PKPO (arXiv 2505.15201) calls annealing."""

    def __init__(self, trainer: GRPOTrainer, k: int, **bounds: float | None) -> None:
        super().__init__(trainer, k, **bounds)
        self._first = k

    def advantages(self, rewards: Tensor, num_generations: int) -> Tensor:
        done = self._trainer.state.global_step / max(1, self._trainer.state.max_steps - 1)
        self.k = 1 + round((self._first - 1) * (1 - done))
        return super().advantages(rewards, num_generations)


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


class SoftStep(StepGuard):
    """PCGrad's step times the reliability of p, i.e. the share of |p|^2 that is no noise.

    After the Bayesian soft projection of arXiv 2602.06453, as far as its abstract goes: a projection that counts noise.
    For p = q + e with a normal prior on q the posterior mean of q is rho p, and a projection on it moves g by
    rho max(0, -<g, p>) / |p|^2 p.
    """

    def _project(self, protected: list[Tensor]) -> None:
        inner = self.engine.inner_products([(self.engine.gradient(), protected)])[0]
        coefficient = max(0.0, self.reliability or 0.0) * max(0.0, -inner) / (self._norm_sq or 1.0)
        self.engine.add_(protected, coefficient)


class PerModuleStep(StepGuard):
    """PCGrad in each parameter tensor by itself: g_m <- g_m + max(0, -<g_m, p_m>) / |p_m|^2 p_m.

    One-sided Modular Gradient Surgery (arXiv 2602.02301): the paper also projects p, and its code, too, takes a
    parameter tensor for a module.
    """

    def _project(self, protected: list[Tensor]) -> None:
        gradient = self.engine.gradient()
        inner = self.engine.inner_products([([g], [p]) for g, p in zip(gradient, protected, strict=True)])
        norm_sq = self.engine.inner_products([([p], [p]) for p in protected])
        moves = [max(0.0, -gp) / pp if pp > 0 else 0.0 for gp, pp in zip(inner, norm_sq, strict=True)]
        self.engine.add_([p * c for p, c in zip(protected, moves, strict=True)], 1.0)


class OtherRule(PassKGuardCallback):
    """The guard with another rule in the place of the projection."""

    rule: type[StepGuard]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._mitigator.steps.__class__ = self.rule


def by(rule: type[StepGuard]) -> type[PassKGuardCallback]:
    """The guard with this rule."""
    return type(f"{rule.__name__}Callback", (OtherRule,), {"rule": rule})


class KStarCallback(PassKGuardCallback):
    """Trains on the measured k*: the largest k up to which no conflict is established, at most the setting's k."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if self.estimate is not None and self.estimate.k_star is not None:
            objective = PassKObjective.of(self._trainer)
            objective.k = max(1, min(self.config.k, self.estimate.k_star))


def keep_unsolved(trainer: GRPOTrainer, samples: int = 16) -> None:
    """Restrict training to the prompts without a success among `samples` completions of the starting policy.

    That is the intervention of arXiv 2606.15455. The counts are drawn from the exact success probabilities.
    """
    rows = trainer.train_dataset
    with torch.no_grad():
        p = success_probability(trainer.model, trainer.processing_class, list(rows)).double().clamp(0, 1)
    generator = torch.Generator().manual_seed(trainer.args.seed)
    successes = torch.binomial(torch.full_like(p, float(samples)), p, generator=generator)
    trainer.train_dataset = rows.select((successes == 0).nonzero().flatten().tolist())


@dataclass(frozen=True)
class Arm:
    """How a run is guarded.

    Attributes:
        label: for tables and pictures.
        guard: fields of GuardConfig; None for a run without the callback.
        objective: makes the objective of the run.
        callback: class of the guard.
        before: called with the trainer before the guard is added.
    """

    label: str
    guard: dict[str, Any] | None = None
    objective: Callable[..., PassKObjective] = PassKObjective
    callback: type[PassKGuardCallback] = PassKGuardCallback
    before: Callable[[GRPOTrainer], None] | None = None

    def prepare(self, trainer: GRPOTrainer, setting: Setting) -> PassKGuardCallback | None:
        """Add the guard as a user would."""
        if self.before is not None:
            self.before(trainer)
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
    return Arm(
        f"{share:g} J_1 + {1 - share:g} J_k",
        objective=partial(WeightedObjective, spec=f"mixture:k={{k}},share={share}"),
    )


_ALWAYS = {"mitigation": "project", "gate": "always"}
"""For rules that know no test of a conflict."""

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
    "recipe": Arm(
        "1.0 J_1 + 0.2 J_k",
        objective=partial(WeightedObjective, spec="mixture:k={k},share=0.8333333333333334", scale=1.2),
    ),
    "anneal": Arm("k annealed to 1 (PKPO)", objective=AnnealedObjective),
    "k_star": Arm("k = measured k*", {"mitigation": "off", "instruments": "angle"}, callback=KStarCallback),
    "maxrl": Arm("MaxRL", objective=partial(WeightedObjective, spec="maxrl")),
    "hard_only": Arm("J_1 on unsolved prompts", objective=_on_pass_at_1, before=keep_unsolved),
    "mgda": Arm("MGDA (torchjd)", _ALWAYS, callback=by(ShortestStep)),
    "soft": Arm("soft projection", _ALWAYS | {"instruments": "angle"}, callback=by(SoftStep)),
    "per_module": Arm("PCGrad in each module", _ALWAYS | {"instruments": "angle"}, callback=by(PerModuleStep)),
    "pass_at_1": Arm("train on J_1", objective=_on_pass_at_1),
}
CORE = ("none", "hold", "project", "reweight", "floor")
"""The arms that every setting is run with, on more seeds than the others."""
