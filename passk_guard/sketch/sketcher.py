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
from passk_guard.sketch.backward import score_pass
from passk_guard.sketch.batches import TokenBatch, check_batch, check_dim, check_log_probs, check_prompts
from passk_guard.sketch.coverage import Coverage, find_sketched_parameters, warn_if_low, warn_missed
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

    def __init__(self, model: nn.Module, dim: int = 16384, method: Method = "kronecker", seed: int = 0) -> None:
        if method not in get_args(Method):
            raise GuardError(f"Expected `method` in {get_args(Method)}; found {method!r}. Pass one of them.")
        if method != "identity":
            check_dim(dim, method)
        self.model, self.method = model, method
        self._find_parameters()
        self._asked_dim = dim
        self._missed: set[str] = set()
        self._checked_norms: set[nn.Module] = set()
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
            completion_mask: [B, T], 1 on completion tokens.
            slots: [B] int64 in -1..num_slots-1; -1: the sample takes part in the forward only.
            num_slots: rows of the result.
            temperature: of the sampling.
            log_probs: [B] floating point or None. log pi(y_i | x_i) at `temperature` is written into it in the order
                of the samples, ignored ones included. The pass computes them in any case.

        Returns:
            [num_slots, dim] fp32 (float64 for a float64 model), on the device of `input_ids`.

        Raises:
            GuardError: arguments that do not fit together, packed or left-padded rows, a model that returns no
                logits.
            FailedRefresh: NaN or infinity in the result; names the samples.
        """
        check_batch(input_ids, attention_mask, completion_mask, slots, num_slots, temperature)
        check_log_probs(log_probs, len(slots))
        if self._parameters.trainable != {id(p) for p in self.model.parameters() if p.requires_grad}:
            self._find_parameters()
            self._projections = Projections(self.seed)
        device = input_ids.device
        order = slots.argsort(stable=True)  # makes the samples of a slot neighbours
        layout = lay_out(slots[order].to(device))
        order = order.to(device)
        completion = completion_mask.to(device).bool()[order]
        batch = TokenBatch(input_ids[order], attention_mask.to(device)[order], completion, layout.slots)
        found = self._pass(layout, batch, num_slots, temperature)
        if found is None:  # the closed form does not apply to this model
            self._closed = False
            found = self._pass(layout, batch, num_slots, temperature)
        assert found is not None
        sketch, log_p, unseen = found
        log_p = log_p[order.argsort()]
        _check_finite(sketch, log_p)
        if log_probs is not None:
            log_probs.copy_(log_p)
        if unseen and not self._missed:
            warn_missed(unseen, self._parameters.sizes)
        self._missed |= unseen
        return sketch

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
        self._closed = self._parameters.head is not None  # until a pass shows that the closed form does not apply

    def _pass(
        self, layout: Layout, batch: TokenBatch, num_slots: int, temperature: float
    ) -> tuple[Tensor, Tensor, set[str]] | None:
        """Sketch [num_slots, dim], log-probabilities, names of unseen parameters; None as for `score_pass`."""
        double = any(p.dtype == torch.float64 for p in self.model.parameters())
        dtype = torch.float64 if double else torch.float32
        rows = torch.zeros(len(layout.groups), self.dim, dtype=dtype, device=layout.slots.device)
        into = _ACCUMULATORS[self.method](rows, layout, self._parameters.shapes, self._projections)
        model, norms = self.model, self._checked_norms
        scored = score_pass(model, self._parameters, into, norms, batch, temperature, self._closed)
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
