"""Passes over sampled completions: their log-probabilities, and which of them share a pass, or a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.probe.records import Rollouts, limits_of
from passk_guard.sketch import TokenBatch, filler_batch, predictions, token_batches
from passk_guard.sketch.backward import forward_logits
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.isolation import sampling_mode
from passk_guard.utils.ranks import Ranks

_CHUNK = 1 << 24  # logits turned into log-probabilities at a time
_TRIED = (8, 16)  # tokens of the prompt and of each completion in the trial of shared prompts
_ATTENTION = ("eager", "sdpa")  # that adds a mask of any form to the scores
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # as configs of transformers name them


@dataclass(frozen=True)
class Scorer:
    """Log-probabilities of completions, by forward passes that all ranks make together.

    Attributes:
        model: as `ScoreSketcher` takes it, below any engine.
        ranks: the processes of the run.
        pad_token_id: fills batches up.
        autocast: makes the context the forward passes run in, as training does.
    """

    model: nn.Module
    ranks: Ranks
    pad_token_id: int
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def log_probs(self, batch: TokenBatch, temperature: float) -> Tensor:
        """[N] float64 log pi(y | x) of the completions of a batch, in nats, on the CPU.

        Raises:
            FailedRefresh: on all ranks, when the pass failed on one.
        """
        tokens = self.token_log_probs(batch, temperature)
        row, token, _ = predictions(batch.completion_mask)
        completion = batch.first[row] + batch.completion_mask[row, token] - 1
        return torch.zeros(len(batch.slots), dtype=torch.float64).index_add_(0, completion.cpu(), tokens)

    def token_log_probs(self, batch: TokenBatch, temperature: float) -> Tensor:
        """[M] float64, the same of each completion token that counts, in the order of the rows."""
        return self.ranks.together(partial(self._pass, batch, temperature))

    def filler(self) -> TokenBatch:
        """A batch of one sample that counts nowhere."""
        return filler_batch(pad_token_id=self.pad_token_id, device=self.ranks.device)

    def _pass(self, batch: TokenBatch, temperature: float) -> Tensor:
        try:
            return self._forward(batch, temperature)
        except Exception:
            if self.ranks.count > 1:  # the others wait in this pass, where weights are sharded
                self._forward(self.filler(), 1.0)
            raise

    def _forward(self, batch: TokenBatch, temperature: float) -> Tensor:
        with sampling_mode(self.model, seed=0), self.autocast():
            return token_log_probs(forward_logits(self.model, batch, differentiable=False), batch, temperature)


def token_log_probs(logits: Tensor, batch: TokenBatch, temperature: float) -> Tensor:
    """[M] float64 log softmax(logits / temperature)[y_t] of the completion tokens that count, in nats, on the CPU.

    Args:
        logits: [B, T, V].
        batch: that they are of.
        temperature: of the sampling, > 0.
    """
    row, token, position = predictions(batch.completion_mask)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    step = max(1, _CHUNK // logits.shape[-1])
    parts = (row.split(step), position.split(step), batch.input_ids[row, token].split(step))
    found = [torch.zeros(0, dtype=torch.float64)]
    for b, t, y in zip(*parts, strict=True):
        log_p = (logits[b, t].to(wide) / temperature).log_softmax(-1)
        found.append(log_p.gather(1, y[:, None]).squeeze(1).cpu().double())
    return torch.cat(found)


class SharedPrompts:
    """Whether completions may stand side by side behind one prompt, found by trying it; the same on every rank.

    A prompt of P tokens and its n completions of C then take P + n C tokens of a pass in place of n (P + C). The model
    must take position ids and a 4-D attention mask, and score a completion there as it does alone. A layer with a state
    does not, nor one whose window of attention is shorter than a sample: the mask replaces its own. Flash attention is
    not tried: its code takes such a mask for one of [B, T] and indexes out of bounds, which no GPU process survives.

    Args:
        scorer: makes the passes of the trial.
    """

    def __init__(self, scorer: Scorer) -> None:
        limits = limits_of(scorer.model)
        self._scorer, self._vocabulary, self._context = scorer, limits["vocabulary"], limits["context"]
        config: Any = getattr(scorer.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        windows = [window for name in _WINDOWS if isinstance(window := getattr(text, name, None), int)]
        self._window, self._width = min(windows, default=math.inf), getattr(text, "hidden_size", None)
        self._right = None if getattr(text, "_attn_implementation", None) in _ATTENTION else False

    def room(self, prompt: int) -> int:
        r"""Most completion tokens behind a prompt of P tokens.

        Per layer of width h a token takes 24 h^2 operations, and 4 h for each token that it could attend to, as masked
        ones are computed too. With s completion tokens in a row, the work per completion token is proportional to
        $(P + s)(6h + P + s) / s$, which is smallest at $s = \sqrt{P (6h + P)}$.
        """
        best = math.isqrt(prompt * (6 * (self._width or 0) + prompt))
        return best if self._context is None else min(best, self._context - prompt)

    def hold(self, longest: int) -> bool:
        """Whether samples of up to `longest` tokens may share prompts. Every rank asks with the same number."""
        if self._right is None:
            self._right = self._width is not None and self._agree()
        return self._right and longest <= self._window

    def _agree(self) -> bool:
        """Try two random completions behind one prompt: their scores are those of each alone, and not of one text.

        The error is compared with the difference that a neighbour makes to a completion. On random Qwen2 models of 12
        layers it is up to 2e-6 of that in float32 and 0.013 in bf16. Where a random Llama of two layers ignores the
        mask it is 0.5, the positions 0.4; with weights of 0.02 for 0.3, where neither does much, 0.17 and 0.001.
        """
        before, size = _TRIED
        if self._vocabulary is None or (self._context is not None and self._context < before + 2 * size):
            return False
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self._vocabulary, (before + 2 * size,), generator=generator).tolist()
        one, two = ids[before : before + size], ids[before + size :]
        try:
            together = self._tried(ids[:before], [one, two])
            alone = torch.cat([self._tried(ids[:before], [one]), self._tried(ids[:before], [two])])
            mixed = self._tried(ids[:before], [one + two])
        except FailedRefresh:
            return False
        with self._scorer.autocast():
            kind = self._scorer.ranks.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        most = tolerance(self._scorer.model, autocast)
        error = (together - alone).square().mean().sqrt()
        wrong = not error <= most * (mixed - alone)[size:].square().mean().sqrt()  # NaN is
        return not self._scorer.ranks.max(int(wrong))

    def _tried(self, prompt: list[int], completions: list[list[int]]) -> Tensor:
        number, length = len(completions), sum(map(len, completions))
        (batch,) = token_batches(
            [prompt] * number,
            completions,
            [0] * number,
            max_tokens=len(prompt) + length,
            pad_token_id=self._scorer.pad_token_id,
            device=self._scorer.ranks.device,
            groups=[0] * number,
            room=lambda _: length,
        )
        return self._scorer.token_log_probs(batch, 1.0)


def tolerance(model: nn.Module, autocast: torch.dtype | None = None) -> float:
    """What rounding may make of an error, as a share of an effect that is there."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()} | ({autocast} if autocast else set())
    return 0.05 if any(torch.finfo(kind).bits < 32 for kind in types) else 1e-3


def shared_batches(
    ranks: Ranks,
    rollouts: Rollouts,
    slots: Tensor,
    max_tokens: int,
    pad_token_id: int,
    shared: SharedPrompts | None = None,
    groups: Tensor | None = None,
) -> list[TokenBatch]:
    """This rank's samples with a slot, in as many batches as any rank has: parts of one model run equally many passes.

    Args:
        rollouts: of this rank. slots: [B] int64, -1 for samples that are left out.
        max_tokens: of one batch, padding included.
        shared: lets samples of one prompt share it, where they are of one of the `groups` [B]; None: none do.
    """
    together = groups is not None and shared is not None and shared.hold(ranks.max(_longest(rollouts, slots)))

    def own() -> list[TokenBatch]:
        return list(
            token_batches(
                rollouts.prompt_ids,
                rollouts.completion_ids,
                slots.tolist(),
                max_tokens=max_tokens,
                pad_token_id=pad_token_id,
                device=ranks.device,
                groups=groups.tolist() if together and groups is not None else None,
                room=(lambda prompt: 0) if shared is None else shared.room,
                policy_masks=rollouts.policy_masks,
            )
        )

    batches = ranks.together(own)
    missing = ranks.max(len(batches)) - len(batches)
    return batches + [filler_batch(pad_token_id=pad_token_id, device=ranks.device)] * missing


def _longest(rollouts: Rollouts, slots: Tensor) -> int:
    lengths = zip(rollouts.prompt_ids, rollouts.completion_ids, slots.tolist(), strict=True)
    return max((len(prompt) + len(completion) for prompt, completion, slot in lengths if slot != -1), default=0)
