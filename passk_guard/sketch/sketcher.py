"""Score vectors of completions, summed by slot and sketched, in one forward and backward with frozen weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from passk_guard.sketch.accumulator import (
    Accumulator,
    CountSketchAccumulator,
    IdentityAccumulator,
    Layout,
    Projections,
    lay_out,
)
from passk_guard.sketch.backward import READS_PADDING, reads_padding, score_pass, unused
from passk_guard.sketch.batches import TokenBatch, check_batch, check_dim, check_log_probs, check_prompts
from passk_guard.sketch.coverage import (
    Coverage,
    SketchedParameters,
    find_sketched_parameters,
    refuse_if_low,
    warn_if_low,
    warn_missed,
)
from passk_guard.sketch.kronecker import KroneckerAccumulator
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.text import first_of

Method = Literal["kronecker", "countsketch", "identity"]

_ACCUMULATORS: dict[Method, type[Accumulator]] = {
    "kronecker": KroneckerAccumulator,
    "countsketch": CountSketchAccumulator,
    "identity": IdentityAccumulator,
}


class ScoreSketcher:
    """Computes S_s = Pi sum_{i: slots[i] = s} grad_theta log pi(y_i | x_i) without a gradient per completion.

    Pi is linear and random with E[Pi^T Pi] = 1, so inner products are kept in expectation:
    E<S_s, S_s'> = <grad_s, grad_s'>. Only parameters that require grad count as theta (with LoRA: the
    adapters). The rms error of a cosine is about k_eff^-1/2, where k_eff is close to `dim` for
    "countsketch" and some fraction of it for "kronecker", which is faster. All pairs share one Pi, so their errors are
    correlated, Cov(e_ij, e_kl) = (c_ik c_jl + c_il c_jk) / k_eff with c the cosines of the vectors. A mean over pairs
    errs more than independent errors would, 1.4 to 1.5 times where gradients have a direction in common: its k_eff is
    half as large. No interval counts this error; a new Pi in each refresh averages it.

    Methods:
        kronecker: sum_t (P_o^T delta_t)(P_i^T u_t)^T per layer, with an independent pair (P_o, P_i) for each, all
            layers in one accumulator; after TRAK (arXiv 2303.14186) and LoGra (arXiv 2405.13954).
        countsketch: each layer's gradient is formed per slot, and hashed (Charikar et al., 2002).
        identity: the flattened gradients in the order of `named_parameters`, for tests and tiny models.

    The model is left exactly as found: requires_grad, `.grad`, train/eval flags, random state, hooks. Gradient
    checkpointing stays active where the model trains with it. Dropout is off.

    Attributes:
        method: as passed.
        seed: of the projections in use.

    Raises:
        GuardError: the model has no trainable parameter, `method` is unknown, or `dim` does not suit it.
    """

    _parameters: SketchedParameters
    _settled: bool
    _idle: set[str]
    _missed: set[str]

    def __init__(self, model: nn.Module, dim: int = 16384, method: Method = "kronecker", seed: int = 0) -> None:
        if method not in get_args(Method):
            raise GuardError(f"Expected `method` in {get_args(Method)}; found {method!r}. Pass one of them.")
        if method != "identity":
            check_dim(dim, method)
        self.model, self.method = model, method
        self._find_parameters()
        self._asked_dim = dim
        self._checked: dict[nn.Module, bool] = {}
        self._reads_padding: bool | None = None  # not known yet
        self.reseed(seed)
        warn_if_low(self.coverage, self._parameters.sizes)

    @property
    def dim(self) -> int:
        """Numbers per row of a sketch; for "identity" the number of trainable scalars."""
        return self.coverage.total if self.method == "identity" else self._asked_dim

    @property
    def coverage(self) -> Coverage:
        """Share of the trainable parameters that the sketch sees, as far as the passes so far have shown."""
        return self._parameters.coverage(self._missed)

    def require_coverage(self) -> None:
        """Raise GuardError, naming the parameters, when the sketch sees less than 80% of them; after `settle`."""
        refuse_if_low(self.coverage, self._parameters.sizes)

    def reseed(self, seed: int) -> None:
        """Sample new projections. An average over refreshes then averages the sketch error as well.

        Sketches of different seeds cannot be compared: never take inner products across a reseed.
        """
        self.seed = seed
        self._projections = Projections(seed)

    def sketch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        slots: Tensor,
        num_slots: int,
        temperature: float = 1.0,
        log_probs: Tensor | None = None,
    ) -> Tensor:
        """Row s: the sketched sum, over samples i with slots[i] = s, of grad log pi(y_i | x_i).

        log pi(y|x) = sum over completion tokens of log softmax(logits / temperature)[y_t], in nats, a sum and
        not a mean over tokens.

        Args:
            input_ids: [B, T] int64, prompt directly followed by completion, padded on the right.
            attention_mask: [B, T], 1 on tokens, 0 on padding.
            completion_mask: [B, T], 1 on completion tokens. Further completions of the same prompt may follow in the
                row, 2, 3, ... on their tokens, for a model that `SharedPrompts` accepts; the row is their sum. Tokens
                in a completion that the policy did not sample, such as a tool's result, have the number's negative:
                they are read, and their log-probability does not count.
            slots: [B] int64 in -1..num_slots-1; -1: the sample takes part in the forward only.
            num_slots: rows of the result.
            temperature: of the sampling.
            log_probs: [B] floating point or None. log pi(y_i | x_i) at `temperature` is written into it in the order
                of the samples, ignored ones included. The pass computes them in any case.

        Returns:
            [num_slots, dim] fp32 (float64 for a float64 model), on the device of `input_ids`.

        Raises:
            GuardError: arguments that do not fit together, packed or left-padded rows, a model that returns no
                logits, padding for a model whose logits depend on it.
            FailedRefresh: NaN or infinity in the result; names the samples.
        """
        check_batch(input_ids, attention_mask, completion_mask, slots, num_slots, temperature)
        check_log_probs(log_probs, len(slots))
        if self._parameters.trainable != {id(p) for p in self.model.parameters() if p.requires_grad}:
            self._find_parameters()
            self._projections = Projections(self.seed)
        self.settle(input_ids.device)
        self._check_padding(input_ids, attention_mask)
        samples, width = input_ids.shape
        if samples == width:  # a layer that is called on [T, B, d] would look like one on [B, T, d]
            input_ids, attention_mask = (torch.cat([x, x[:1]]) for x in (input_ids, attention_mask))
            completion_mask = torch.cat([completion_mask, torch.zeros_like(completion_mask[:1])])
            slots = torch.cat([slots, slots.new_tensor([-1])])
        device = input_ids.device
        order = slots.argsort(stable=True)  # makes the samples of a slot neighbours
        layout = lay_out(slots[order].to(device))
        order = order.to(device)
        completion = completion_mask.to(device).long()[order]
        batch = TokenBatch(input_ids[order], attention_mask.to(device)[order], completion, layout.slots)
        sketch, log_p, unseen = self._sketched(layout, batch, num_slots, temperature)
        log_p = log_p[order.argsort()][:samples]
        _check_finite(sketch, log_p)
        if log_probs is not None:
            log_probs.copy_(log_p)
        self._note_missed(unseen - self._idle)
        return sketch

    def settle(self, device: torch.device) -> None:
        """Find out in a short pass which parameters are sketched, and how; once, and before the first sketch.

        Where the formula of a module does not hold, or the module is bypassed, it runs again instead, or the module
        around it does (`replay.py`). What then still gets no gradient is not covered, and a warning names it. The pass
        is the same on all ranks: two samples of eight tokens.

        Args:
            device: of the tokens.
        """
        if self._settled:
            return
        self._settled = True
        batch, layout = self._short_batch(device), lay_out(torch.arange(2, device=device))
        levels: dict[nn.Module, int] = {}
        while True:
            unseen = self._sketched(layout, batch, 2, 1.0)[2]
            if not levels:
                self._idle = unused(self.model, unseen, batch)
            unseen -= self._idle
            holders = [h for h in self._parameters.holders if h.names & unseen and h.level < len(h.stages)]
            if not holders:
                break
            levels |= {holder.module: holder.level + 1 for holder in holders}
            self._parameters = find_sketched_parameters(self.model, levels)
        # An expert that the short batch did not reach is computed where the others are.
        agreed = {replay.module for replay in self._parameters.replays if replay.agreed}
        for holder in self._parameters.holders:
            level = next((i for i, stage in enumerate(holder.stages) if i and stage in agreed), None)
            if level is not None and holder.names <= self._idle:
                levels[holder.module] = level
        self._parameters = find_sketched_parameters(self.model, levels)
        for replay in self._parameters.replays:
            replay.agreed = replay.module in agreed
        self._note_missed(unseen)

    def _short_batch(self, device: torch.device) -> TokenBatch:
        tables = [m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)]
        ids = torch.arange(16, device=device).remainder(max(tables, default=16)).view(2, 8)
        mask = torch.ones_like(ids)
        return TokenBatch(ids, mask, (mask.cumsum(1) > 3).long(), torch.arange(2, device=device))

    def _note_missed(self, unseen: set[str]) -> None:
        if unseen and not self._missed:
            warn_missed(unseen, self._parameters.sizes)
        self._missed |= unseen

    def prompt_scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        prompt_index: Tensor,
        correct: Tensor,
        num_prompts: int,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """S+ and S- of each prompt: the sketched sums of score vectors over its correct and its wrong samples.

        Args:
            input_ids, attention_mask, completion_mask: [B, T], as in `sketch`.
            prompt_index: [B] int64 in -1..num_prompts-1; -1: ignored.
            correct: [B]: 1 correct, 0 wrong, -1 no verdict (ignored).
            num_prompts: m.
            temperature: of the sampling.

        Returns:
            S_plus and S_minus, each [m, dim].

        Raises:
            GuardError, FailedRefresh: as in `sketch`.
        """
        check_prompts(prompt_index, correct, num_prompts)
        correct = correct.to(prompt_index.device)
        slots = torch.where(correct == 1, prompt_index, prompt_index + num_prompts)
        slots = torch.where((correct >= 0) & (prompt_index >= 0), slots, -1)
        rows = self.sketch(input_ids, attention_mask, completion_mask, slots, 2 * num_prompts, temperature)
        return rows[:num_prompts], rows[num_prompts:]

    def _find_parameters(self) -> None:
        self._parameters = find_sketched_parameters(self.model)
        self._settled = False
        self._idle = set()
        self._missed = set()
        self._closed = self._parameters.head is not None  # until a pass shows that the closed form does not apply

    def _sketched(
        self, layout: Layout, batch: TokenBatch, num_slots: int, temperature: float
    ) -> tuple[Tensor, Tensor, set[str]]:
        found = self._pass(layout, batch, num_slots, temperature)
        if found is None:  # the closed form does not apply to this model
            self._closed = False
            found = self._pass(layout, batch, num_slots, temperature)
        assert found is not None
        return found

    def _check_padding(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Refuse a padded batch for a model that reads padding. One check a run, in the first call on every rank.

        Rows without padding are not refused: with one, a rank that was refused keeps in step with the others.
        """
        if self._reads_padding is None:
            self._reads_padding = False  # whatever comes of it, it is not repeated: the other ranks do not either
            self._reads_padding = reads_padding(self.model, input_ids, attention_mask)
        if self._reads_padding and not bool(attention_mask.all()):
            raise GuardError(READS_PADDING)

    def _pass(
        self, layout: Layout, batch: TokenBatch, num_slots: int, temperature: float
    ) -> tuple[Tensor, Tensor, set[str]] | None:
        """Sketch [num_slots, dim], log-probabilities, names of unseen parameters; None as for `score_pass`."""
        double = any(p.dtype == torch.float64 for p in self.model.parameters())
        dtype = torch.float64 if double else torch.float32
        rows = torch.zeros(len(layout.groups), self.dim, dtype=dtype, device=layout.slots.device)
        into = _ACCUMULATORS[self.method](rows, layout, self._parameters.shapes, self._projections)
        model, checked = self.model, self._checked
        scored = score_pass(model, self._parameters, into, checked, batch, temperature, self._closed)
        if scored is None:
            return None
        sketch = rows.new_zeros(num_slots, self.dim)
        into.fold_into(sketch)
        return sketch, *scored


def _check_finite(sketch: Tensor, log_probs: Tensor) -> None:
    if bool(sketch.isfinite().all()):
        return
    found = (~log_probs.isfinite()).nonzero().flatten().tolist()
    cause = "every log-probability is finite, so the backward overflowed"
    if found:
        cause = f"log pi(y|x) is not finite for samples {first_of(found, 10)} of the batch"
    raise FailedRefresh(f"The sketched score vectors hold NaN or infinity: {cause}.")
