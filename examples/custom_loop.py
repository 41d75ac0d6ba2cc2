"""The guard in a hand-written loop: no Trainer and no callback, only functions of tensors.

    python -m examples.custom_loop [--mitigation off|hold|reweight|project] [--steps 60]

A step is rollout -> reward -> advantages -> backward -> optimizer, as in verl or OpenRLHF. Every few steps a refresh
goes before it, on held-out prompts:

    rollout -> reward -> sketched S+ and S- -> Gram matrix -> cosine with its interval -> verdict

and then, by --mitigation: nothing; a multiplier of the pass@1 advantages that are added in `passk_advantages`, set by
what the last steps did to the samples of the refresh before; a floor under the weights of the prompts there; or one
backward of the pass@1 loss on the probe's samples, whose gradient each training gradient is turned towards before the
step.

Left out: the first multiplier from the angle (`first_multiplier`), a key-value cache, several updates on the same
samples with clipped ratios, a KL penalty, Adam (the plain gradient is what the theory is about), micro-batches,
devices, checkpoints, a refresh that fails (`FailedRefresh`), and more than one process: there, sum the sketches over
ranks before the Gram matrix, and the protected gradient too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.interference.exact import evaluate
from examples.interference.task import correct, make_prompts
from examples.interference.warm_start import warm_start
from passk_guard import (
    ConflictEstimate,
    HoldController,
    ProbeGram,
    ScoreSketcher,
    estimate_change,
    estimate_pooled,
    passk_advantages,
)
from passk_guard.change import Fused, estimate_level
from passk_guard.estimation.verdict import DecisionRule, DecisionState
from passk_guard.estimation.verdict import step as decide
from passk_guard.mitigation import FloorState, HoldMeasurement, project_gradient, smooth_floor, solve_floor

Rows = Sequence[Mapping[str, str]]
Reward = Callable[..., list[float]]
NEW_TOKENS = 5  # four digits and end-of-sequence


@dataclass(frozen=True)
class Settings:
    mitigation: str = "off"
    steps: int = 60
    seed: int = 0
    k: int = 8
    prompts: int = 32  # of a training step
    samples: int = 16  # of each prompt, in training and in the probe
    learning_rate: float = 0.004  # on grad J_k itself; the demo's 0.02 with a loss that TRL divides by 5
    probe_prompts: int = 64
    refresh_steps: int = 5
    pool_refreshes: int = 3
    sketch_dim: int = 16384
    gamma: float = 0.2  # cosine to the pass@1 gradient that is asked for
    largest_floor: float = 1.0  # the weight that pass@1 gives every prompt
    floor_average: float = 0.8  # weight of the past
    test_prompts: int = 768  # for exact pass rates, which only the lines show


@dataclass(frozen=True)
class Samples:
    """n samples of each of m prompts, B = m n in all, those of a prompt next to each other."""

    ids: Tensor  # [B, T] prompt, completion, padding on the right
    completion: Tensor  # [B, T] 1 on completion tokens, end-of-sequence included
    attention: Tensor  # [B, T] 1 on tokens
    correct: Tensor  # [m, n] float 0/1


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    samples: int,
    reward: Reward,
    generator: torch.Generator,
) -> Samples:
    """Sample at temperature 1 and let the verifier judge. All prompts of this task are equally long."""
    many = [row for row in rows for _ in range(samples)]
    ids = torch.tensor(tokenizer([row["prompt"] for row in many])["input_ids"])  # [B, 7]
    completion = torch.zeros_like(ids)  # [B, 7]
    alive = torch.ones(len(many), 1, dtype=torch.bool)  # [B, 1]
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]  # [B, V]
        token = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)  # [B, 1]
        ids = torch.cat([ids, token.where(alive, tokenizer.pad_token_id)], 1)  # [B, t + 1]
        completion = torch.cat([completion, alive.long()], 1)  # [B, t + 1]
        alive &= token != tokenizer.eos_token_id
    texts = tokenizer.batch_decode(ids[:, -NEW_TOKENS:], skip_special_tokens=True)
    columns = {name: [row[name] for row in many] for name in many[0] if name != "prompt"}
    rewards = torch.tensor(reward(completions=texts, **columns))  # [B]
    attention = completion.clone()
    attention[:, :-NEW_TOKENS] = 1
    return Samples(ids, completion, attention, (rewards >= 1).float().view(len(rows), samples))


def log_probabilities(model: PreTrainedModel, samples: Samples) -> Tensor:
    """[B] log pi(y_i|x_i), a sum over the tokens of a completion and not a mean."""
    logits = model(input_ids=samples.ids, attention_mask=samples.attention, use_cache=False).logits[:, :-1]
    token = logits.float().log_softmax(-1).gather(-1, samples.ids[:, 1:, None]).squeeze(-1)  # [B, T - 1]
    return (token * samples.completion[:, 1:]).sum(1)


def policy_loss(model: PreTrainedModel, samples: Samples, advantages: Tensor) -> Tensor:
    """-mean of A_i log pi(y_i|x_i) over all samples; with `passk_advantages` its gradient estimates -grad J_k."""
    return -(advantages.flatten() * log_probabilities(model, samples)).mean()


@dataclass(frozen=True)
class Window:
    """Samples of the probe, and [m, n] log-probabilities under the policy that drew them."""

    samples: Samples
    log_probs: Tensor

    @classmethod
    @torch.no_grad()
    def opened(cls, model: PreTrainedModel, samples: Samples) -> Window:
        return cls(samples, log_probabilities(model, samples).double().view(samples.correct.shape))

    def log_ratios(self, model: PreTrainedModel) -> Tensor:
        """[m, n] of the present policy over that one."""
        return Window.opened(model, self.samples).log_probs - self.log_probs


def probe_gram(sketcher: ScoreSketcher, samples: Samples, keys: Sequence[str], seed: int) -> ProbeGram:
    """All that the estimate needs of a refresh: no gradient is kept, and `.grad` is not touched."""
    m, n = samples.correct.shape
    prompt = torch.arange(m).repeat_interleave(n)  # [B]
    sketcher.reseed(seed)  # fresh projections, so that pooling averages their error out too
    plus, minus = sketcher.prompt_scores(
        samples.ids, samples.attention, samples.completion, prompt, samples.correct.flatten().long(), m
    )  # [m, D]
    sums = torch.cat([plus, minus]).double()  # [2m, D]
    counts = samples.correct.sum(1).long()  # [m]
    return ProbeGram(sums @ sums.T, torch.full_like(counts, n), counts, keys)


def pass1_gradient(model: PreTrainedModel, samples: Samples, parameters: Sequence[Tensor]) -> list[Tensor]:
    """-grad J_1 on the probe's samples, in parameter space; `.grad` is not touched."""
    return list(torch.autograd.grad(policy_loss(model, samples, passk_advantages(samples.correct, 1)), parameters))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    reward: Reward = correct,
    report: Callable[[str], None] = print,
) -> list[ConflictEstimate]:
    """The whole run; returns the estimates of all refreshes."""
    s = settings
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=s.learning_rate)
    sketcher = ScoreSketcher(model, s.sketch_dim)
    rows = make_prompts("train", s.steps * s.prompts, s.seed)
    test = make_prompts("test", s.test_prompts, seed=0)
    sampling = torch.Generator().manual_seed(s.seed)  # the probe has one of its own: it must not move this one
    history: list[ProbeGram] = []
    estimates: list[ConflictEstimate] = []
    decision, floor, protected, coefficient = DecisionState(), FloorState(), None, 0.0
    controller, fused, window = HoldController(), Fused(), None
    held = controller.begin()
    for step in range(s.steps):
        if step % s.refresh_steps == 0:
            seed = s.seed * 1_000_003 + step
            held_out = make_prompts("probe", s.probe_prompts, seed)  # fresh ones each time
            probe = rollout(model, tokenizer, held_out, s.samples, reward, torch.Generator().manual_seed(seed))
            keys = [row["prompt"] for row in held_out]  # prompts met twice are known to the jackknife
            history = [*history, probe_gram(sketcher, probe, keys, seed)][-s.pool_refreshes :]
            estimates.append(estimate_pooled(history, s.k))
            decision, verdict = decide(decision, estimates[-1], DecisionRule())
            if s.mitigation == "reweight":
                solution = solve_floor(history, s.k, gamma=s.gamma, largest=s.largest_floor)
                floor = smooth_floor(floor, solution, s.floor_average, largest=s.largest_floor)
            if s.mitigation == "hold":
                if window is not None:  # lambda never depends on samples that measure what it does
                    change = estimate_change(window.log_ratios(model), window.samples.correct, s.k)
                    fused = fused.with_window(change)
                    measured = HoldMeasurement.of(fused.pass_at_1, change, s.refresh_steps)
                    held = controller.step(held, measured)
                fused, window = fused.with_level(estimate_level(probe.correct, s.k)), Window.opened(model, probe)
            if s.mitigation == "project":
                protected = pass1_gradient(model, probe, parameters)  # in force until the next refresh
            exact = evaluate(model, tokenizer, test, s.k)
            report(_line(step, exact, estimates[-1], verdict.status) + _action(s, floor, coefficient, held.multiplier))
        batch = rows[step * s.prompts : (step + 1) * s.prompts]
        samples = rollout(model, tokenizer, batch, s.samples, reward, sampling)
        hold = held.multiplier if s.mitigation == "hold" else 0.0
        advantages = passk_advantages(samples.correct, s.k, floor=floor.floor, hold=hold)  # [m, n]; 0 is none
        optimizer.zero_grad()
        policy_loss(model, samples, advantages).backward()
        if protected is not None:
            coefficient = project_gradient([p.grad for p in parameters], protected, s.gamma).coefficient
        optimizer.step()  # clipping would go right before this, after the projection
    exact = evaluate(model, tokenizer, test, s.k)
    report(f"step {s.steps:3}  pass@1 {exact['pass_at_1']:.3f}  pass@{s.k} {exact[f'pass_at_{s.k}']:.3f}  the end")
    return estimates


def _line(step: int, exact: Mapping[str, float], estimate: ConflictEstimate, verdict: str) -> str:
    k, cosine = estimate.k, "cos undetermined"
    if estimate.cosine is not None:
        cosine = f"cos {estimate.cosine:+.2f} [{estimate.ci_low:+.2f}, {estimate.ci_high:+.2f}]"
    rates = f"pass@1 {exact['pass_at_1']:.3f}  pass@{k} {exact[f'pass_at_{k}']:.3f}"
    return f"step {step:3}  {rates}  {cosine:24}  {verdict:12}"


def _action(settings: Settings, floor: FloorState, coefficient: float, hold: float) -> str:
    last = f"  coefficient {coefficient:.2f}"  # of the step before this refresh
    actions = {"off": "", "hold": f"  lambda {hold:.2f}", "reweight": f"  floor {floor.floor:.2f}", "project": last}
    return actions[settings.mitigation]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mitigation", choices=("off", "hold", "reweight", "project"), default=Settings.mitigation)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"), help="where warm starts are kept")
    given = vars(parser.parse_args())
    model_dir = warm_start(given.pop("cache"), given["seed"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    train(model, tokenizer, Settings(**given))


if __name__ == "__main__":
    main()
