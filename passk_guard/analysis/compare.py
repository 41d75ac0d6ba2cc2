"""Two checkpoints on the same prompts with the same seeds: how much pass@k differs, at all k together."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from passk_guard.analysis.comparison import Comparison
from passk_guard.analysis.load import check_model, is_adapter, load_model, load_tokenizer
from passk_guard.analysis.run import Job, choose_prompts, failure_as_error, generate_sampler
from passk_guard.analysis.settings import Settings
from passk_guard.analysis.store import RolloutStore
from passk_guard.estimation.band import simultaneous_band, upper_bound
from passk_guard.passk.closed_forms import pass_at_k
from passk_guard.probe.progress import wanted
from passk_guard.probe.prompts import ProbeSet, prompt_text
from passk_guard.probe.refresh import count_verdicts
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError
from passk_guard.utils.isolation import seeded, untouched
from passk_guard.utils.ranks import Ranks

Side: TypeAlias = "str | Path | tuple[Any, Any]"
_FEWEST_PROMPTS = 3
_MOVERS = 10


def compare(
    a: Side,
    b: Side,
    probe: Any,
    correct: Any,
    *,
    num_samples: int = 16,
    ks: Sequence[int] | None = None,
    prompts: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    correct_threshold: float = 1.0,
    confidence: float = 0.95,
    tolerance: float = 0.0,
    base: str | Path | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Measure how much pass@k of checkpoint B differs from that of A, on the same prompts with the same seeds.

    Each checkpoint samples n completions of m prompts. Differences of the unbiased pass@k are taken prompt by prompt,
    so that what makes a prompt easy or hard cancels. Directories are loaded one after the other, on the accelerator
    where there is one. With several processes every rank calls this, and every rank gets the same record.

    Args:
        a, b: directories of local checkpoints or PEFT adapters, or pairs (model, tokenizer).
        probe, correct: as for `analyze`.
        num_samples: n, completions of each prompt.
        ks: the k of pass@k, each at most n; 1 is always among them. None takes all from 1 to n.
        prompts: m, prompts sampled from the probe with `seed`; None takes all.
        temperature, max_new_tokens, batch_size, correct_threshold: as in `Settings`.
        seed: of the choice of prompts, of the sampling and of the band's bootstrap.
        confidence: of the band, two-sided, and of the verdict on pass@1, one-sided.
        tolerance: loss of pass@1 that is accepted, in [0, 1).
        base: the model that adapters among `a` and `b` belong on; by default the one that their configs name.
        progress: bars on the first rank; None shows them in a terminal.

    Raises:
        GuardError: a value outside its range, k > n, a directory that is no checkpoint, fewer than 3 prompts, or fewer
            than 3 with as many verdicts as the largest k from both.
    """
    if not 0 <= as_real(tolerance, "tolerance") < 1:
        raise GuardError(f"Expected 0 <= `tolerance` < 1, a difference of two pass rates; found {tolerance}.")
    settings = Settings(
        ks=(1,) if ks is None else ks,
        num_samples=num_samples,
        prompts=prompts,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        correct_threshold=correct_threshold,
        confidence=confidence,
    )
    if ks is None:
        settings = settings.model_copy(update={"ks": tuple(range(1, settings.num_samples + 1))})
    verifier = resolve_verifier(correct, threshold=settings.correct_threshold)
    chosen = choose_prompts(probe, verifier, settings)
    if base is not None and not any(isinstance(side, (str, Path)) and is_adapter(side) for side in (a, b)):
        raise GuardError("Expected `base` with an adapter as A or B; found none. Leave it out, or pass an adapter.")
    for side in (a, b):  # refused now and not after A was sampled
        _check(side, base)
    measured = []
    for side in (a, b):
        measured.append(_measure(side, base, chosen, verifier, settings, progress))
        gc.collect()  # the model of A, before that of B is loaded
    (n_a, c_a, failures_a), (n_b, c_b, failures_b) = measured
    kept = torch.minimum(n_a, n_b) >= settings.k
    if int(kept.sum()) < _FEWEST_PROMPTS:
        raise GuardError(
            f"Expected at least {_FEWEST_PROMPTS} prompts with {settings.k} verdicts, the largest k, from A and B; "
            f"found {int(kept.sum())} of {len(kept)}. Lower k, or mend the verifier: it gave none on some samples."
        )
    k = torch.tensor(settings.ks)
    rates = [pass_at_k(n[kept, None], c[kept, None], k) for n, c in ((n_a, c_a), (n_b, c_b))]
    difference = rates[1] - rates[0]
    band = simultaneous_band(difference, settings.confidence, seed=settings.seed)
    first = difference[:, 0]
    low_1, high_1 = -upper_bound(-first, settings.confidence), upper_bound(first, settings.confidence)
    return Comparison(
        a=_name(a),
        b=_name(b),
        ks=settings.ks,
        pass_a=_floats(rates[0].mean(0)),
        pass_b=_floats(rates[1].mean(0)),
        difference=_floats(band.mean),
        standard_error=_floats(band.standard_error),
        low=_floats(band.low),
        high=_floats(band.high),
        low_1=low_1,
        high_1=high_1,
        established_lower=high_1 < -tolerance,
        confidence=settings.confidence,
        tolerance=float(tolerance),
        seed=settings.seed,
        num_samples=settings.num_samples,
        num_prompts=int(kept.sum()),
        left_out=int((~kept).sum()),
        failures=failures_a + failures_b,
        verifier=verifier.name,
        **_movers(chosen, kept, *((c / n.clamp(min=1)).tolist() for n, c in ((n_a, c_a), (n_b, c_b)))),
    )


def _movers(prompts: ProbeSet, kept: Tensor, a: list[float], b: list[float]) -> dict[str, Any]:
    """The prompts whose p-hat fell and rose most: text, p-hat of A and of B."""
    order = sorted(kept.nonzero().flatten().tolist(), key=lambda i: b[i] - a[i])
    lost = [i for i in order[:_MOVERS] if b[i] < a[i]]
    gained = [i for i in order[: -_MOVERS - 1 : -1] if b[i] > a[i]]
    return {
        name: tuple((prompt_text(prompts[i]["prompt"]), a[i], b[i]) for i in rows)
        for name, rows in (("lost", lost), ("gained", gained))
    }


def _check(side: Side, base: str | Path | None) -> None:
    if isinstance(side, (str, Path)):
        on = base if is_adapter(side) else None
        check_model(side, base=on)
        load_tokenizer(side, base=on)
    elif not isinstance(side, tuple) or len(side) != 2:
        raise GuardError(
            f"Expected a checkpoint as a directory or a pair (model, tokenizer); found {type(side).__name__}."
        )


def _measure(
    side: Side,
    base: str | Path | None,
    prompts: ProbeSet,
    verifier: Verifier,
    settings: Settings,
    progress: bool | None,
) -> tuple[Tensor, Tensor, int]:
    """[m] verdicts and [m] correct ones of a checkpoint, and samples on which the verifier raised; over all ranks."""
    if isinstance(side, tuple):
        model, tokenizer = side
    else:
        on = base if is_adapter(side) else None
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model, tokenizer = load_model(side, base=on).to(device or "cpu"), load_tokenizer(side, base=on)
    sampler = generate_sampler(model, tokenizer, settings)
    sampler.check_lengths(prompts.rows)
    ranks = Ranks(next(model.parameters()).device)
    job = Job(model, tokenizer, prompts, verifier, sampler, settings, ranks, wanted(progress, ranks))
    with failure_as_error(), untouched(model, tokenizer), seeded(settings.seed):
        rollouts, outcomes = job.answers(RolloutStore(None))
    samples, right = count_verdicts(rollouts, outcomes, ranks)
    return samples, right, int(ranks.sum(torch.tensor([outcomes.failures]))[0])


def _name(side: Side) -> str:
    if isinstance(side, (str, Path)):
        return str(side)
    return str(getattr(getattr(side[0], "config", None), "_name_or_path", None) or type(side[0]).__name__)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
