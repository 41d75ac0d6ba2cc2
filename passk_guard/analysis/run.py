"""The analysis itself: probe -> completions -> right or wrong -> Gram matrix -> what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passk_guard.analysis.estimates import mixed
from passk_guard.analysis.last_layer import last_hidden_layer, only_last_hidden_layer
from passk_guard.analysis.measure import curve_of, estimate_each, inner_product_of, kernel_from, measure_at
from passk_guard.analysis.paper import paper_table
from passk_guard.analysis.predict import predictions
from passk_guard.analysis.prompts import prompt_records, prompt_text
from passk_guard.analysis.results import Analysis, AtK, Number, Sketch
from passk_guard.analysis.sampling import SharedSampling
from passk_guard.analysis.settings import Settings
from passk_guard.analysis.store import ROLLOUTS_NAME, RolloutStore, check_folder, keys_fingerprint, model_fingerprint
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.noise import measure_noise
from passk_guard.estimation.records import ProbeGram
from passk_guard.probe.progress import SketchWithBar, bar, wanted
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresh, Refresher
from passk_guard.probe.rollout_checks import check_rollouts, limits_of
from passk_guard.probe.samplers import GenerateSampler, Sampler
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.isolation import seeded, untouched
from passk_guard.utils.ranks import Ranks

# The prompts of an analysis, checked before a model is loaded.


def choose_prompts(probe: Any, verifier: Verifier, settings: Settings) -> ProbeSet:
    """The prompts that the settings ask for, with all that the verifier needs.

    Raises:
        GuardError: a probe that cannot be read, columns that are missing, or more prompts asked for than there are.
    """
    whole = ProbeSet.of(probe)
    whole.require_columns(verifier.required_columns)
    _refuse_broken_text(whole)
    if settings.prompts is None:
        return whole
    if settings.prompts > len(whole):
        raise GuardError(
            f"Expected `prompts` of at most {len(whole)}, the different prompts in the probe; found "
            f"{settings.prompts}. Leave it out to take all."
        )
    return ProbeSet(whole[i] for i in whole.draw(0, settings.prompts, settings.seed))


def _refuse_broken_text(probe: ProbeSet) -> None:
    for row in probe.rows:
        text = prompt_text(row)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise GuardError(
                f"Expected prompts of whole characters; found half of a surrogate pair in {text[:60]!r}, which no "
                "tokenizer takes. Mend the probe: JSON writes such a character as two \\u escapes."
            )


# From the Gram matrices to the record: no model is needed any more, and every rank comes to the same.


@dataclass(frozen=True)
class Measured:
    """What the model was needed for.

    Attributes:
        refreshes: set of parameters -> counts and Gram matrix; the first is the one the analysis is about.
        sketch: how the first was made.
    """

    refreshes: dict[str, Refresh]
    sketch: Sketch


def conclude(
    measured: Measured, prompts: ProbeSet, verifier: str, model: dict[str, str], settings: Settings
) -> Analysis:
    """All numbers of the record.

    Args:
        measured: from the samples.
        prompts: all m of them, in the order of their places.
        verifier: name of the function that means correct.
        model: its name and fingerprint.
        settings: of the analysis.
    """
    refresh = next(iter(measured.refreshes.values()))
    probe, names = refresh.probe, [int(key) for key in refresh.probe.prompt_keys]
    estimates = estimate_each(probe, settings)
    at_k = [measure_at(probe, k, estimates.get(k), settings.confidence) for k in settings.ks]
    texts = [prompt_text(prompts[i]) for i in names]
    constant = ~mixed(probe)
    noise = measure_noise(probe, settings.k)
    grams = {what: one.probe for what, one in measured.refreshes.items()}
    return Analysis(
        model=model,
        settings=settings.to_dict(),
        verifier=verifier,
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
        paper=paper_table(grams, settings) if settings.protocol == "paper" else None,
        sketch=measured.sketch,
        noise=None if noise is None else noise.to_dict(),
    )


def mean_agreement(probe: ProbeGram, confidence: float) -> Number:
    """E[a] = |grad J_1|^2: the inner product at k = 1."""
    return inner_product_of(estimate_pooled([probe], 1, confidence=confidence))


def reweighted_agreement(at: AtK) -> Number:
    """E[w_k a] / E[w_k], its standard error and interval those of E[w_k a] alone over the estimated E[w_k]."""
    weight = at.mean_weight.value
    if not weight or at.inner_product.value is None:
        return Number()
    parts = (at.inner_product.value, at.inner_product.standard_error, at.inner_product.low, at.inner_product.high)
    return Number(*(None if part is None else part / weight for part in parts))


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

    Samples n completions of m prompts, scores them, sketches the score vectors of right and wrong ones, and reads
    pass rates, cos(grad J_k, grad J_1) over k with its confidence band, the prompts that pull against the rest and
    what the mitigations would do off one Gram matrix (arXiv 2602.21189, Sec. 3 and 4). The model comes back as it was.

    With several processes (`accelerate launch`) every rank calls this with a whole model of its own; prompts are shared
    out, and every rank gets the same Gram matrix.

    Args:
        model: a causal LM of transformers or PEFT; the parameters that require grad count.
        tokenizer: its tokenizer.
        probe: a ProbeSet, a list of rows, a JSONL path or a datasets.Dataset; rows hold `prompt` and what `correct`
            needs.
        correct: the reward function that means *correct*, in TRL's signature, or a `Verifier`.
        out: a folder in which completions are kept as they are sampled: a call that was interrupted goes on from
            there. Results are written by `Analysis.save`.
        force: go on where `out` holds completions of another model or other settings, which are then dropped, or
            other files, which are left alone.
        progress: bars on the first rank; None shows them in a terminal.
        name: of the model, for the report; by default what its config says.
        sampler: draws the completions instead of `model.generate`.
        settings: fields of `Settings`: `ks`, `num_samples`, `prompts`, `temperature`, `max_new_tokens`, ...

    Raises:
        GuardError: misuse, each time with what to pass instead; a verifier that raised on every sample; samples with
            fewer than k verdicts on every prompt.
        TypeError: a setting that does not exist.
    """
    chosen = Settings(**settings)
    verifier = resolve_verifier(correct, threshold=chosen.correct_threshold)
    prompts = choose_prompts(probe, verifier, chosen)
    sampler = sampler or _sampler(model, tokenizer, chosen)
    sampler.check_lengths(prompts.rows)
    if chosen.last_layer or chosen.protocol:
        last_hidden_layer(model)  # refused now and not after an hour of sampling
    ranks = Ranks(next(model.parameters()).device)
    job = _Job(model, tokenizer, prompts, verifier, sampler, chosen, ranks, wanted(progress, ranks))
    fingerprint = model_fingerprint(model)
    store = RolloutStore(None if out is None else Path(out) / ROLLOUTS_NAME, ranks.index)
    _on_first(ranks, lambda: job.prepare(store, fingerprint, force))
    try:
        measured = job.measure(store)
    except FailedRefresh as error:
        if isinstance(error.__cause__, GuardError):
            raise error.__cause__ from None
        raise GuardError(f"The samples hold no answer: {error}.") from error
    return conclude(measured, prompts, verifier.name, _model_name(model, name, fingerprint), chosen)


@dataclass(frozen=True)
class _Job:
    """What an analysis needs at hand, checked."""

    model: Any
    tokenizer: Any
    prompts: ProbeSet
    verifier: Verifier
    sampler: Sampler
    settings: Settings
    ranks: Ranks
    shown: bool

    def prepare(self, store: RolloutStore, fingerprint: str, force: bool) -> None:
        if store.folder is None:
            return
        check_folder(store.folder.parent, fingerprint, self.settings.to_dict(), force=force)
        keys = keys_fingerprint([self.prompts.key(i) for i in range(len(self.prompts))])
        of_samples = {"model": fingerprint, "probe": keys} | self.settings.of_the_samples()
        store.prepare(of_samples, force=force)

    def measure(self, store: RolloutStore) -> Measured:
        """Samples, verdicts and Gram matrices; the model is left as it was found."""
        with untouched(self.model, self.tokenizer), seeded(self.settings.seed):
            rollouts = self.ranks.together(lambda: self._checked(self._sample(store)))
            outcomes = self.ranks.together(lambda: self.verifier.score(rollouts))
            sketched: dict[str, tuple[Refresh, Sketch]] = {}
            if not self.settings.last_layer:
                sketched[ALL] = self._sketch(rollouts, outcomes, ALL)
            if self.settings.last_layer or self.settings.protocol:
                with only_last_hidden_layer(self.model):
                    sketched[LAST] = self._sketch(rollouts, outcomes, LAST)
        return Measured({what: refresh for what, (refresh, _) in sketched.items()}, next(iter(sketched.values()))[1])

    def _checked(self, rollouts: Rollouts) -> Rollouts:
        # Kept ones may have been edited, and a sampler be the user's own: an unknown id would end a process on a GPU.
        check_rollouts(rollouts, **limits_of(self.model))
        return rollouts

    def _sample(self, store: RolloutStore) -> Rollouts:
        chosen = self.settings
        sampling = SharedSampling(
            self.prompts.rows, self.sampler, chosen.num_samples, chosen.batch_size, chosen.seed, self.ranks, store
        )
        with bar("sampling", self.shown) as advance, _progress_restored(self.sampler):
            return sampling.run(advance)

    def _sketch(self, rollouts: Rollouts, outcomes: Outcomes, what: str) -> tuple[Refresh, Sketch]:
        chosen = self.settings
        with bar(f"sketching, {what}", self.shown) as advance:
            sketcher = SketchWithBar(self.model, chosen.sketch_dim, chosen.sketch_method, chosen.seed, advance)
            refresher = Refresher(sketcher, self.ranks, chosen.k, chosen.max_tokens, _pad(self.tokenizer))
            sketcher.expect(rollouts, outcomes)
            refresh = refresher.run(lambda: (rollouts, outcomes), range(len(self.prompts)), chosen.seed)
        seen = sketcher.coverage
        return refresh, Sketch(
            chosen.sketch_method, sketcher.dim, chosen.seed, what, seen.covered, seen.total, list(seen.uncovered)
        )


def _sampler(model: Any, tokenizer: Any, settings: Settings) -> GenerateSampler:
    return GenerateSampler(
        model,
        tokenizer,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )


@contextmanager
def _progress_restored(sampler: Any) -> Iterator[None]:
    before = getattr(sampler, "on_progress", None)
    try:
        yield
    finally:
        if hasattr(sampler, "on_progress"):
            sampler.on_progress = before


def _on_first(ranks: Ranks, stage: Callable[[], None]) -> None:
    """Run on the first rank while the others wait; refused there, it is refused on all."""
    refused: GuardError | None = None
    if ranks.index == 0:
        try:
            stage()
        except GuardError as error:
            refused = error
    if ranks.max(int(refused is not None)):
        raise refused or GuardError("The first rank refused to start; see its message.")


def _pad(tokenizer: Any) -> int:
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    pad = inner.pad_token_id if inner.pad_token_id is not None else inner.eos_token_id
    return int(pad or 0)  # what stands in padding is never seen


def _model_name(model: Any, name: str | None, fingerprint: str) -> dict[str, str]:
    said = name or getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__
    return {"name": str(said), "fingerprint": fingerprint}
