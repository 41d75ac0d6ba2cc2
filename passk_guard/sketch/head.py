"""The head of a language model in closed form, some tokens at a time, without a [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.sketch.accumulator import Accumulator, Span
from passk_guard.sketch.layers import Use, kind_of
from passk_guard.sketch.shared_prompts import predictions
from passk_guard.utils.patching import MethodPatch

_CHUNK_SCALARS = {"cpu": 1 << 22}  # logits formed at a time on the CPU: memory that the allocator reuses
_CHUNK_ELSEWHERE = 1 << 26  # enough tokens to keep a GPU busy; 256 MiB in fp32
_FEWEST_TOKENS = 256  # in a chunk, for any vocabulary: with fewer, reading the weight takes most of the time


def head_of(model: nn.Module) -> nn.Linear | None:
    """The linear layer that makes the logits, if `model` names one.

    None where the layer is wrapped (by an adapter) or its forward is replaced (by offloading). Such a head is sketched
    like every other layer.
    """
    for module in model.modules():
        if callable(named := getattr(module, "get_output_embeddings", None)):
            head = named()
            plain = kind_of(head) == "linear" if isinstance(head, nn.Module) else False
            return head if plain and "forward" not in vars(head) else None
    return None


class ClosedHead:
    """Replaces the forward of the head in one pass, and computes everything that depends on the head.

    With g_t = (onehot(y_t) - softmax(z_t / temperature)) / temperature the gradient of log pi(y_t | .) with respect
    to the logits z_t, it computes per chunk of completion tokens the log-probabilities, the gradient g_t W of the
    layer's input, and the sketch of the weight gradient sum_t g_t h_t^T, and then drops the chunk. The model gets a
    stand-in for the logits: zeros of shape [B, T, V] that take one number in memory. The backward from it returns the
    computed gradients. Prompt and padding tokens have g_t = 0 and are left out.

    The weight is read only while the module is called, when sharded engines have gathered it.

    Attributes:
        log_probs: [B] log pi(y | x) in nats, of a row's completions together, fp32 (float64 for a float64 model).
        token: positions of the tokens that predict a completion token, among the B T of the batch.
    """

    def __init__(
        self, use: Use, accumulator: Accumulator, input_ids: Tensor, completion: Tensor, temperature: float
    ) -> None:
        assert isinstance(use.module, nn.Linear)
        self.use, self.accumulator, self.temperature, self._module = use, accumulator, temperature, use.module
        self.shape, self.vocabulary = tuple(input_ids.shape), use.module.out_features
        self._sample, token, position = predictions(completion)
        self.token = self._sample * self.shape[1] + position
        self._targets = input_ids[self._sample, token]
        self._spans = _spans(accumulator, completion)
        self.log_probs = accumulator.rows.new_zeros(self.shape[0])
        self._calls, self._stand_in = 0, 0
        self._reached = False

    def installed(self) -> MethodPatch:
        """A context in which the head's forward is this one."""
        return MethodPatch(self.use.module, "forward", lambda original: partial(self._forward, original))

    @property
    def handed_out(self) -> bool:
        """Whether the model has been given a stand-in for its logits."""
        return self._stand_in != 0

    def made(self, logits: Tensor) -> bool:
        """Whether `logits` is the output of the head or a view of it: no scaling, no cap, no second head."""
        return self._calls == 1 and self.handed_out and logits.data_ptr() == self._stand_in

    def is_whole(self, logits: Tensor) -> bool:
        """Run the backward from `logits`, as of `made`; whether they are the whole output, in its order.

        Every number of the stand-in is the same one in memory, so that no view of it can be told from it. Its gradient
        can: this one has other strides along each dimension, and a slice or a permutation hands on another tensor.
        """
        batch, width, vocabulary = logits.shape
        self._sent = logits.new_zeros(2 * batch * width + vocabulary).as_strided(logits.shape, (2 * width, 2, 1))
        logits.backward(self._sent)
        return self._reached

    def receive(self, gradient: Tensor) -> None:
        """Note whether the gradient of the stand-in is the one that was sent off."""
        places = [(x.data_ptr(), x.shape, x.stride()) for x in (gradient, self._sent)]
        self._reached = places[0] == places[1]

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if self._calls > 1 or not isinstance(hidden, Tensor) or hidden.shape[:-1] != self.shape:
            return original(*args, **kwargs)
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return original(*args, **kwargs)
        with torch.no_grad():
            gradient = self._closed_form(hidden.detach().flatten(0, 1)[self.token])
        logits: Tensor = _StandIn.apply(hidden, gradient, self)
        self._stand_in = logits.data_ptr()
        return logits

    def _closed_form(self, hidden: Tensor) -> Tensor:
        """The gradients [N, d] of the rows of `hidden` [N, d], one per completion token."""
        kind, found = hidden.device.type, torch.empty_like(hidden)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        weight = self._module.weight.to(dtype)
        bias = None if self._module.bias is None else self._module.bias.to(dtype)
        step = max(_FEWEST_TOKENS, _CHUNK_SCALARS.get(kind, _CHUNK_ELSEWHERE) // len(weight))
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(hidden), step):
                part = slice(first, first + step)
                rows = self._excess(hidden[part].to(dtype), weight, bias, part)
                found[part] = (rows.to(dtype) @ weight).div_(-self.temperature)
                self._add(rows, hidden[part], first)
        return found

    def _excess(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
        """softmax - onehot [n, V] in the dtype of `log_probs`, which gains the log-probabilities of the tokens."""
        logits = nn.functional.linear(hidden, weight, bias).to(self.log_probs.dtype)
        if self.temperature != 1:
            logits = logits.div_(self.temperature)
        targets, p = self._targets[part, None], logits.softmax(-1)
        # The largest probability is at least 1/V, so that its logarithm is finite.
        normaliser = logits.amax(-1) - p.amax(-1).log()
        self.log_probs.index_add_(0, self._sample[part], logits.gather(1, targets).squeeze(1) - normaliser)
        return p.scatter_add_(1, targets, p.new_full((1, 1), -1.0).expand(len(targets), 1))

    def _add(self, rows: Tensor, hidden: Tensor, first: int) -> None:
        """Sketch sum_t g_t h_t^T and sum_t g_t over one chunk; `rows` are -temperature g_t."""
        spans = [
            (group, max(start - first, 0), min(end - first, len(rows)))
            for group, start, end in self._spans
            if start < first + len(rows) and end > first
        ]
        if (name := self.use.weight) is not None:
            left = self.accumulator.project(name, "left", rows)
            right = self.accumulator.project(name, "right", hidden / -self.temperature)
            self.accumulator.add_tokens(name, left, right, spans)
        if (name := self.use.bias) is not None:
            summed = rows.new_zeros(self.shape[0], rows.shape[1])
            summed.index_add_(0, self._sample[first : first + len(rows)], rows / -self.temperature)
            self.accumulator.add_vector(name, summed)


def _spans(accumulator: Accumulator, completion: Tensor) -> list[Span]:
    """The predicted completion tokens of each group among those of the batch."""
    ends = [0, *completion.gt(0).sum(1).cumsum(0).tolist()]
    groups = accumulator.layout.groups
    return [(group, ends[start], ends[end]) for group, (_, start, end) in enumerate(groups) if ends[end] > ends[start]]


class _StandIn(torch.autograd.Function):
    """Zeros in the shape of logits. The backward returns the gradient computed before, whatever it is given."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor, head: ClosedHead) -> Tensor:
        ctx.gradient, ctx.head, ctx.shape = gradient, head, hidden.shape
        return head.log_probs.new_zeros(()).expand(*hidden.shape[:-1], head.vocabulary)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.head.receive(grads[0])
        # Added: several completions start at one token, the end of the prompt that they share.
        gradient = ctx.gradient.new_zeros(ctx.shape).flatten(0, 1).index_add_(0, ctx.head.token, ctx.gradient)
        return gradient.view(ctx.shape), None, None
