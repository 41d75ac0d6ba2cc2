"""The analysis itself: probe -> completions -> right or wrong -> Gram matrix -> what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passk_guard.analysis.conclude import Measured, conclude
from passk_guard.analysis.drawing import drawn_probe
from passk_guard.analysis.fingerprint import keys_fingerprint, model_fingerprint
from passk_guard.analysis.folder import ROLLOUTS_NAME, check_folder
from passk_guard.analysis.last_layer import last_hidden_layer, only_last_hidden_layer
from passk_guard.analysis.record import Analysis, Sketch
from passk_guard.analysis.rollouts import RolloutStore
from passk_guard.analysis.sampling import SharedSampling
from passk_guard.analysis.settings import Settings
from passk_guard.probe.progress import SketchWithBar, bar, wanted
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresh, Refresher
from passk_guard.probe.rollout_checks import check_rollouts, limits_of
from passk_guard.probe.samplers import GenerateSampler, Sampler
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.utils.errors import GuardError, VoidRefresh
from passk_guard.utils.isolation import seeded, untouched
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
    prompts = drawn_probe(probe, verifier, chosen)
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
    except VoidRefresh as error:
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
