"""Log-probabilities of a sample of completions under the policy of today, for the realised change. Forward passes only.

A window opens when completions are sampled and scored, and closes when a later policy scores the same completions. Both
scores are sums over whole completions at the sampling temperature.

A model that computes in bf16 or fp16 rounds each score, so that two scores differ by more than the policy moved. Scores
in other batches do not show by how much: on a CPU they are the same to the last bit. So the completions are scored
once more at the sample, with the token embeddings multiplied by 1 + u eps/2, u uniform in [-1, 1] and eps that of the
format: as large as one rounding, which makes all later ones fall out another way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from passk_guard.passk.importance import effective_share
from passk_guard.probe.out_of_memory import halved, largest, until_it_fits
from passk_guard.probe.passes import Scorer, SharedPrompts, shared_batches
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.sketch import TokenBatch, shared_positions, shares_prompts, unshared
from passk_guard.sketch.backward import READS_PADDING, reads_padding
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.files import save_whole
from passk_guard.utils.ranks import Ranks

_LOGITS = 1 << 28  # numbers of one pass's logits: 1 GiB in float32
_FORMAT = 2
_ROUNDED = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Window:
    """Completions of m prompts x n samples, and what the policy that sampled them gave for each.

    Attributes:
        step: optimizer steps taken when they were sampled.
        batches: this rank's samples; slot x n + j is sample j of prompt x. Every rank has equally many batches.
        log_probs: [m, n] float64 log pi(y | x) in nats under the sampling policy, the same on every rank.
        correct: [m, n] int64, 1 correct, 0 wrong, -1 not counted (no verdict, or a prompt that is not measured).
        keys: m identities of the prompts.
        temperature: of the sampling.
        noise: standard deviation in nats of log ratios from rounding alone; None for a model that computes in float32.
        sampler: [m, n] float64, `log_probs` less log mu of what was sampled from, 0 for samples that do not count; None
            where that is the model.
        scores: [m, n] float64 of the reward function whose mean is held, NaN for none; None where none is held.
    """

    step: int
    batches: list[TokenBatch]
    log_probs: Tensor
    correct: Tensor
    keys: tuple[Hashable, ...]
    temperature: float
    noise: float | None = None
    sampler: Tensor | None = None
    scores: Tensor | None = None

    @property
    def mismatch(self) -> dict[str, float | None]:
        """Root mean square of `sampler` over the completions, in nats, and the share of their number they are worth."""
        if self.sampler is None:
            return {}
        counted = self.correct >= 0
        share = effective_share(self.sampler, counted)[counted.any(1)]
        size = (self.sampler.square().sum() / counted.sum().clamp(min=1)).sqrt()
        return {"sampler_mismatch": float(size), "sampler_effective_samples": float(share.mean())}


@dataclass(frozen=True)
class Rescorer:
    """Scores completions with one forward pass each, on all ranks alike.

    Attributes:
        model: as `ScoreSketcher` takes it, below any engine.
        ranks: the processes of the run.
        max_tokens: of one pass, padding included; a longer sample has one of its own.
        pad_token_id: fills batches up.
        vocabulary: rows of the logits, which bound the tokens of a pass further; None where the model does not say.
        autocast: makes the context the forward passes run in, as training does.
        precision: format that the model computes in; in bf16 and fp16 `open` takes a second pass, for the noise.
        shared: whether the completions of a prompt may stand behind one copy of it; None: they do not.
    """

    model: nn.Module
    ranks: Ranks
    max_tokens: int
    pad_token_id: int
    vocabulary: int | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    precision: torch.dtype = torch.float32
    shared: SharedPrompts | None = None

    @property
    def scorings(self) -> int:
        """Passes that `open` makes over the completions."""
        return 2 if self.precision in _ROUNDED else 1

    def open(
        self,
        rollouts: Rollouts,
        outcomes: Outcomes,
        keys: Sequence[Hashable],
        step: int,
        measured: Tensor | None = None,
    ) -> Window:
        """Score what has just been sampled.

        Args:
            rollouts, outcomes: of this rank.
            keys: m identities of the prompts over all ranks.
            step: optimizer steps taken so far.
            measured: [m] bool, False for prompts that steer the updates to come; None measures all.

        Raises:
            FailedRefresh: on all ranks, when a pass failed on one or a log-probability is not finite.
        """
        slots, correct = self.ranks.together(lambda: _table(rollouts, outcomes, measured))
        most = self.ranks.max(correct.shape[1])
        correct = self.ranks.sum(nn.functional.pad(correct, (0, most - correct.shape[1]))) - 1
        prompt, place = slots
        places = torch.where(prompt >= 0, prompt * most + place, -1)
        window = Window(
            step=step,
            batches=self._batches(rollouts, places, prompt),
            log_probs=torch.empty(0),
            correct=correct,
            keys=tuple(keys),
            temperature=rollouts.temperature,
        )
        window = self._scored(window)
        if outcomes.scores is not None:  # on all ranks, as the settings say
            scores = self.ranks.sum(_placed(outcomes.scores.tolist(), places, correct.numel())).view(correct.shape)
            window = replace(window, scores=torch.where(correct >= 0, scores, torch.nan))
        if self.ranks.max(int(rollouts.log_probs is not None)):
            sampled = self.ranks.sum(_placed(rollouts.log_probs or (), places, correct.numel())).view(correct.shape)
            window = replace(window, sampler=torch.where(correct >= 0, window.log_probs - sampled, 0.0))
        if self.scorings == 1:
            return window
        jitter = self._scored(window, torch.finfo(self.precision).eps / 2).log_probs - window.log_probs
        counted = (window.correct >= 0).sum().clamp(min=1)
        return replace(window, noise=float((jitter.square().sum() / counted).sqrt()))

    def check_padding(self, window: Window) -> bool:
        """Whether a batch of any rank is padded, which is then known to change no log-probability.

        Raises:
            GuardError: on all ranks, for a model whose logits depend on padding; FailedRefresh: the check failed.
        """
        if not self.ranks.max(int(any(not bool(batch.attention_mask.all()) for batch in window.batches))):
            return False
        first = window.batches[0]

        def reads() -> bool:
            with self.autocast():
                return reads_padding(self.model, first.input_ids, first.attention_mask)

        if self.ranks.max(int(self.ranks.together(reads))):
            raise GuardError(READS_PADDING)
        return True

    def log_ratios(self, window: Window) -> Tensor:
        """[m, n] float64 log of the present over the sampling policy's probability; 0 for samples that do not count.

        Raises:
            FailedRefresh: on all ranks, when a pass failed on one or a log-probability is not finite.
        """
        return self._scored(window).log_probs - window.log_probs

    def _scored(self, window: Window, jitter: float = 0.0) -> Window:
        batches, scorer = window.batches, Scorer(self.model, self.ranks, self.pad_token_id, self.autocast)
        if not self._share(batches):  # a resumed run may have another attention
            batches = [unshared(batch) for batch in batches]

        def attempt() -> Tensor:
            table = torch.zeros(window.correct.numel(), dtype=torch.float64)
            for batch in batches:  # agreed on after each: one that went on alone would wait for the others' weights
                with jittered(self.model, jitter):
                    found = scorer.log_probs(batch, window.temperature)
                slots = batch.slots.cpu()
                table[slots[slots >= 0]] = found[slots >= 0]
            return self.ranks.sum(table)

        def smaller() -> bool:
            nonlocal batches
            if largest(self.ranks, batches)[1] <= 1:
                return False
            batches = halved(batches)
            return True

        table = until_it_fits(self.ranks, attempt, smaller).view(window.correct.shape)
        if not bool(table.isfinite().all()):
            raise FailedRefresh("a log-probability of the probe's completions is not finite")
        return replace(window, batches=batches, log_probs=table)

    def _share(self, batches: Sequence[TokenBatch]) -> bool:
        """Whether the completions of these batches may stand as they do; the same answer on every rank."""
        masks = [(b.attention_mask, b.completion_mask) for b in batches if shares_prompts(b.completion_mask)]
        longest = self.ranks.max(max((int(shared_positions(*pair).max()) + 1 for pair in masks), default=0))
        return longest == 0 or (self.shared is not None and self.shared.hold(longest))

    def _batches(self, rollouts: Rollouts, slots: Tensor, prompt: Tensor) -> list[TokenBatch]:
        tokens = min(self.max_tokens, max(1, _LOGITS // self.vocabulary)) if self.vocabulary else self.max_tokens
        return shared_batches(self.ranks, rollouts, slots, tokens, self.pad_token_id, self.shared, prompt)


def precision_of(model: nn.Module, mixed: str) -> torch.dtype:
    """The format with the fewest digits that training computes in; `mixed` is accelerate's mixed_precision."""
    if mixed != "no":
        return torch.float16 if mixed == "fp16" else torch.bfloat16
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


@contextmanager
def jittered(model: nn.Module, size: float) -> Iterator[None]:
    """Token embeddings times 1 + u size, u uniform in [-1, 1] from torch's generator; as they are for a size of 0."""
    if not size:
        yield
        return

    def multiply(module: nn.Module, args: object, output: Tensor) -> Tensor:
        factors = 1 + size * (2 * torch.rand_like(output, dtype=torch.float32) - 1)
        return (output * factors).to(output.dtype)

    handle = cast(Any, model).get_input_embeddings().register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


def save_window(window: Window, path: Path) -> None:
    """Write this rank's part of an open window, whole or not at all.

    Raises:
        OSError, RuntimeError: the folder cannot be written to.
    """
    content = {
        "format": _FORMAT,
        "step": window.step,
        "log_probs": window.log_probs,
        "correct": window.correct,
        "keys": [str(key) for key in window.keys],
        "temperature": window.temperature,
        "noise": window.noise,
        "sampler": window.sampler,
        "scores": window.scores,
        "batches": [
            [x.cpu() for x in (batch.input_ids, batch.attention_mask, batch.completion_mask, batch.slots)]
            for batch in window.batches
        ],
    }
    save_whole(content, path)


def load_window(path: Path, device: torch.device) -> Window | None:
    """Read it back; None where there is none, or one of another format or damaged.

    Loaded with weights_only: a checkpoint from elsewhere cannot run code.
    """
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if content["format"] != _FORMAT:
            return None
        return Window(
            step=int(content["step"]),
            batches=[TokenBatch(*(x.to(device) for x in parts)) for parts in content["batches"]],
            log_probs=content["log_probs"],
            correct=content["correct"],
            keys=tuple(content["keys"]),
            temperature=float(content["temperature"]),
            noise=content["noise"],
            sampler=content.get("sampler"),
            scores=content.get("scores"),
        )
    except Exception:  # of a damaged file torch raises whatever its reader stumbles over
        return None


def _placed(values: Sequence[float], places: Tensor, size: int) -> Tensor:
    """[size] float64 with each value at its place; those with place -1 are left out."""
    table = torch.zeros(size, dtype=torch.float64)
    if len(values):
        table[places[places >= 0]] = torch.tensor(values, dtype=torch.float64)[places >= 0]
    return table


def _table(rollouts: Rollouts, outcomes: Outcomes, measured: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Prompt and place [B] of each sample, -1 for one that does not count, and [m, n] of its verdict plus 1."""
    prompt = torch.tensor(rollouts.prompt_index, dtype=torch.int64)
    verdict = outcomes.correct.to(torch.int64)
    counts = (prompt >= 0) & (verdict >= 0)
    if measured is not None:
        counts &= measured[prompt.clamp(min=0)]
    place = torch.zeros_like(prompt)
    seen = [0] * rollouts.num_prompts
    for i, x in enumerate(prompt.tolist()):
        if x >= 0:
            place[i], seen[x] = seen[x], seen[x] + 1
    correct = torch.zeros(rollouts.num_prompts, max(seen, default=0), dtype=torch.int64)
    correct[prompt[counts], place[counts]] = verdict[counts] + 1
    return (torch.where(counts, prompt, -1), place), correct
