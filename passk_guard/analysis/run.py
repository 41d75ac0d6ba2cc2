"""The analysis: probe -> completions -> right or wrong -> Gram matrix -> what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from passk_guard.analysis.load import last_hidden_layer, only_last_hidden_layer
from passk_guard.analysis.measure import (
    curve_of,
    estimate_each,
    inner_product_of,
    kernel_from,
    measure_at,
    predictions,
    prompt_records,
)
from passk_guard.analysis.results import Analysis, AtK, Number, Sketch
from passk_guard.analysis.sampling import SharedSampling
from passk_guard.analysis.settings import Settings
from passk_guard.analysis.store import ROLLOUTS_NAME, RolloutStore, check_folder, keys_fingerprint, model_fingerprint
from passk_guard.estimation.agreement import informative
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.power import measure_noise
from passk_guard.estimation.records import ProbeGram
from passk_guard.probe.pass_memory import FEWEST_TOKENS, choose_tokens
from passk_guard.probe.passes import Scorer, SharedPrompts
from passk_guard.probe.progress import SketchWithBar, bar, wanted
from passk_guard.probe.prompts import ProbeSet, prompt_text
from passk_guard.probe.records import Outcomes, Rollouts, check_rollouts, limits_of, padding_token
from passk_guard.probe.refresh import Refresh, Refresher
from passk_guard.probe.samplers import GenerateSampler, Sampler
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.isolation import attributes, seeded, untouched
from passk_guard.utils.ranks import Ranks

ALL, LAST = "all trainable parameters", "last hidden layer"


def analyze(
    model: Any,
    tokenizer: Any,
    probe: Any,
    correct: Any,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    name: str | None = None,
    sampler: Sampler | None = None,
    **settings: Any,
) -> Analysis:
    """Measure what training a model on pass@k would do to its pass@1, without training it.

    Samples n completions of m prompts, scores them, and sketches the score vectors of right and wrong ones. From one
    Gram matrix it reads the pass rates, cos(grad J_k, grad J_1) over k with its confidence band, the prompts that pull
    against the rest and what the mitigations would do (arXiv 2602.21189, Sec. 3 and 4). The model comes back unchanged.

    With several processes (`accelerate launch`) every rank calls this with a whole model. Prompts are shared out, and
    every rank gets the same Gram matrix.

    Args:
        model: a causal LM of transformers or PEFT. The parameters that require grad count.
        tokenizer: its tokenizer.
        probe: a ProbeSet, a list of rows, a JSONL path or a datasets.Dataset; rows hold `prompt` and what `correct`
            needs.
        correct: the reward function that means *correct*, in TRL's signature, or a `Verifier`.
        out: a folder in which completions are kept as they are sampled. A call that was interrupted continues from
            there. Results are written by `Analysis.save`.
        force: accept an `out` that holds completions of another model or other settings, which are then dropped, or
            other files, which are left alone.
        progress: bars on the first rank; None shows them in a terminal.
        name: of the model, for the report; by default what its config holds.
        sampler: samples the completions instead of `model.generate`.
        settings: fields of `Settings`: `ks`, `num_samples`, `prompts`, `temperature`, `max_new_tokens`, ...

    Raises:
        GuardError: misuse, each time with what to pass instead; a verifier that raised on every sample; samples with
            fewer than k verdicts on every prompt.
        TypeError: a setting that does not exist.
    """
    given = (model, tokenizer, probe, correct, Settings(**settings))
    return conclude(measure(*given, out=out, force=force, progress=progress, name=name, sampler=sampler))


@dataclass(frozen=True)
class Measured:
    """What the model was needed for, and what it is about.

    Attributes:
        refresh: counts and Gram matrix.
        sketch: how the score vectors were made small.
        prompts: all m of them, in the order of their places.
        verifier: name of the function that means correct.
        model: its name and fingerprint.
        settings: of the analysis.
    """

    refresh: Refresh
    sketch: Sketch
    prompts: ProbeSet
    verifier: str
    model: dict[str, str]
    settings: Settings


def measure(
    model: Any,
    tokenizer: Any,
    probe: Any,
    correct: Any,
    settings: Settings,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    name: str | None = None,
    sampler: Sampler | None = None,
) -> Measured:
    """Samples, verdicts and the Gram matrix of an analysis; arguments and errors as for `analyze`."""
    verifier = resolve_verifier(correct, threshold=settings.correct_threshold)
    prompts = choose_prompts(probe, verifier, settings)
    sampler = sampler or generate_sampler(model, tokenizer, settings)
    sampler.check_lengths(prompts.rows)
    if settings.last_layer:
        last_hidden_layer(model)  # refused now and not after an hour of sampling
    ranks = Ranks(next(model.parameters()).device)
    fingerprint = model_fingerprint(model)
    store = RolloutStore(None if out is None else Path(out) / ROLLOUTS_NAME, ranks.index)
    _on_first(ranks, lambda: _prepare(store, fingerprint, prompts, settings, force))
    job = Job(model, tokenizer, prompts, verifier, sampler, settings, ranks, wanted(progress, ranks))
    with failure_as_error():
        refresh, sketch = job.run(store)
    shown = name or getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__
    return Measured(refresh, sketch, prompts, verifier.name, {"name": str(shown), "fingerprint": fingerprint}, settings)


def generate_sampler(model: Any, tokenizer: Any, settings: Settings) -> GenerateSampler:
    """The sampler of an analysis for which the user gave none."""
    return GenerateSampler(
        model,
        tokenizer,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )


@contextmanager
def failure_as_error() -> Iterator[None]:
    """Raise a stage's failure as the GuardError that caused it, or as one with its reason."""
    try:
        yield
    except FailedRefresh as error:
        if isinstance(error.__cause__, GuardError):
            raise error.__cause__ from None
        raise GuardError(f"The samples hold no answer: {error}.") from error


def choose_prompts(probe: Any, verifier: Verifier, settings: Settings) -> ProbeSet:
    """The prompts that the settings ask for, with all that the verifier needs.

    Raises:
        GuardError: a probe that cannot be read, columns that are missing, more prompts asked for than there are, or
            fewer than three clusters.
    """
    whole = ProbeSet.of(probe)
    whole.require_columns(verifier.required_columns)
    for row in whole.rows:
        text = prompt_text(row["prompt"])
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise GuardError(
                f"Expected prompts of whole characters; found half of a surrogate pair in {text[:60]!r}, which no "
                "tokenizer takes. Mend the probe: JSON writes such a character as two \\u escapes."
            )
    if settings.prompts is not None and settings.prompts > len(whole):
        raise GuardError(
            f"Expected `prompts` of at most {len(whole)}, the different prompts in the probe; found "
            f"{settings.prompts}. Leave it out to take all."
        )
    chosen = whole
    if settings.prompts is not None:
        chosen = ProbeSet(whole[i] for i in whole.draw(0, settings.prompts, settings.seed))
    if settings.cluster_by is not None:
        chosen.clusters(settings.cluster_by)  # refused now and not after an hour of sampling
    return chosen


def conclude(measured: Measured) -> Analysis:
    """All numbers of the record. No model is needed, and every rank gets the same."""
    refresh, prompts, settings = measured.refresh, measured.prompts, measured.settings
    probe, names = refresh.probe, [int(key) for key in refresh.probe.prompt_keys]
    if settings.cluster_by is not None:
        labels = prompts.clusters(settings.cluster_by)
        probe = replace(probe, prompt_keys=[labels[place] for place in names])
    estimates = estimate_each(probe, settings)
    at_k = [measure_at(probe, k, estimates.get(k), settings.confidence) for k in settings.ks]
    texts = [prompt_text(prompts[i]["prompt"]) for i in names]
    constant = ~informative(probe)
    noise = measure_noise(probe, settings.k)
    return Analysis(
        model=measured.model,
        settings=settings.to_dict(),
        verifier=measured.verifier,
        num_prompts=len(prompts),
        left_out=len(prompts) - len(names),
        never_solved=int((constant & (probe.num_correct == 0)).sum()),
        always_solved=int((constant & (probe.num_correct > 0)).sum()),
        remark=refresh.remark,
        at_k=at_k,
        curve=curve_of(estimates),
        mean_agreement=mean_agreement(probe, settings.confidence),
        reweighted_agreement=reweighted_agreement(at_k[-1]),
        prompts=prompt_records(probe, settings.k, names, texts, settings.confidence),
        kernel=kernel_from(probe, names),
        predictions=predictions(probe, estimates, settings),
        sketch=measured.sketch,
        noise=None if noise is None else noise.to_dict(),
    )


def mean_agreement(probe: ProbeGram, confidence: float) -> Number:
    """E[a] = |grad J_1|^2: the inner product at k = 1."""
    return inner_product_of(estimate_pooled([probe], 1, confidence=confidence, curve=False))


def reweighted_agreement(at: AtK) -> Number:
    """E[w_k a] / E[w_k], its standard error and interval those of E[w_k a] alone over the estimated E[w_k]."""
    weight = at.mean_weight.value
    if not weight or at.inner_product.value is None:
        return Number()
    parts = (at.inner_product.value, at.inner_product.standard_error, at.inner_product.low, at.inner_product.high)
    return Number(*(None if part is None else part / weight for part in parts))


@dataclass(frozen=True)
class Job:
    """What the work with the model needs, checked."""

    model: Any
    tokenizer: Any
    prompts: ProbeSet
    verifier: Verifier
    sampler: Sampler
    settings: Settings
    ranks: Ranks
    shown: bool

    def run(self, store: RolloutStore) -> tuple[Refresh, Sketch]:
        """Samples, verdicts and the Gram matrix. The model is left as it was found."""
        with untouched(self.model, self.tokenizer), seeded(self.settings.seed):
            rollouts, outcomes = self.answers(store)
            with only_last_hidden_layer(self.model) if self.settings.last_layer else nullcontext():
                return self._sketch(rollouts, outcomes)

    def answers(self, store: RolloutStore) -> tuple[Rollouts, Outcomes]:
        """This rank's completions and their verdicts."""
        rollouts = self.ranks.together(lambda: self._sample(store))
        return rollouts, self.ranks.together(lambda: self.verifier.score(rollouts))

    def _sample(self, store: RolloutStore) -> Rollouts:
        chosen = self.settings
        sampling = SharedSampling(
            self.prompts.rows, self.sampler, chosen.num_samples, chosen.batch_size, chosen.seed, self.ranks, store
        )
        with bar("sampling", self.shown) as advance, attributes(self.sampler, {"on_progress": None}):
            rollouts = sampling.run(advance)
        # Kept ones may have been edited, and the sampler be the user's: an unknown id would end a process on a GPU.
        check_rollouts(rollouts, **limits_of(self.model))
        return rollouts

    def _sketch(self, rollouts: Rollouts, outcomes: Outcomes) -> tuple[Refresh, Sketch]:
        chosen, what = self.settings, LAST if self.settings.last_layer else ALL
        with bar(f"sketching, {what}", self.shown) as advance:
            sketcher = SketchWithBar(self.model, chosen.sketch_dim, chosen.sketch_method, chosen.seed, advance)
            pad = padding_token(self.tokenizer)
            shared = SharedPrompts(Scorer(self.model, self.ranks, pad))
            tokens = chosen.max_tokens or self._pass_tokens(rollouts)
            refresher = Refresher(sketcher, self.ranks, chosen.k, tokens, pad, shared=shared)
            self.ranks.together(lambda: sketcher.settle(self.ranks.device))
            sketcher.require_coverage()
            sketcher.expect(rollouts, outcomes)
            refresh = refresher.run(lambda: (rollouts, outcomes), range(len(self.prompts)), chosen.seed)
        seen = sketcher.coverage
        return refresh, Sketch(
            chosen.sketch_method, sketcher.dim, chosen.seed, what, seen.covered, seen.total, list(seen.uncovered)
        )

    def _pass_tokens(self, rollouts: Rollouts) -> int:
        """What the free memory holds, but no more than an eighth of all tokens: the bar moves once a pass."""
        own = sum(map(len, [*rollouts.prompt_ids, *rollouts.completion_ids]))
        most = max(FEWEST_TOKENS, self.ranks.max(own) // 8)
        return min(most, choose_tokens(self.model, self.ranks, direction=False))


def _prepare(store: RolloutStore, fingerprint: str, prompts: ProbeSet, settings: Settings, force: bool) -> None:
    if store.folder is None:
        return
    check_folder(store.folder.parent, fingerprint, settings.to_dict(), force=force)
    keys = keys_fingerprint([prompts.key(i) for i in range(len(prompts))])
    store.prepare({"model": fingerprint, "probe": keys} | settings.of_the_samples(), force=force)


def _on_first(ranks: Ranks, stage: Callable[[], None]) -> None:
    """Run on the first rank while the others wait. If it is refused there, it is refused on all."""
    refused: GuardError | None = None
    if ranks.index == 0:
        try:
            stage()
        except GuardError as error:
            refused = error
    if ranks.max(int(refused is not None)):
        raise refused or GuardError("The first rank refused to start; see its message.")
