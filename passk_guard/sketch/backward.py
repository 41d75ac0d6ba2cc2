"""One forward and backward over a batch, with hooks on every covered module.

The gradient of the log-probabilities with respect to the logits is written down in closed form, and the backward
starts from it.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from passk_guard.sketch.accumulator import Accumulator
from passk_guard.sketch.batches import TokenBatch
from passk_guard.sketch.coverage import SketchedParameters
from passk_guard.sketch.head import ClosedHead
from passk_guard.sketch.hooks import Tap, tapped
from passk_guard.sketch.shared_prompts import predictions, shared_attention, shared_positions, shares_prompts
from passk_guard.utils.errors import GuardError
from passk_guard.utils.isolation import frozen_pass, sampling_mode

READS_PADDING = (
    "Expected a model whose logits do not depend on padding; found other logits for a sample that is padded on the "
    "right, with 0 in its attention mask, than for the sample alone. The model ignores the mask or expects padding on "
    "the left. Pass samples of one length to each call, or a model that masks its padding."
)
_PADDED_TOKENS = 8  # of the sample that shows whether padding is read
_ROUNDING = 0.05  # by which its logits may differ, relative to their norm around their mean
_CHUNK_SCALARS = 1 << 24  # logits turned into probabilities at a time: 64 MiB in fp32


def score_pass(
    model: nn.Module,
    parameters: SketchedParameters,
    accumulator: Accumulator,
    checked: dict[nn.Module, bool],
    batch: TokenBatch,
    temperature: float,
    closed: bool,
) -> tuple[Tensor, set[str]] | None:
    """Sketch the gradients of log pi(y | x) into `accumulator`.

    Args:
        model: the language model. parameters: of that model.
        accumulator: empty, laid out for the batch.
        checked: whether the formula of a module held when it was first called.
        batch: rows sorted by slot.
        temperature: of the sampling.
        closed: whether the closed form replaces the head. Whether that applies depends on the code of the model
            alone, so that all ranks of a sharded model agree.

    Returns:
        log pi(y | x) [B] in nats, of a row's completions together, and the names of parameters to which at least one
        covered module contributed nothing. None if `closed` and the logits are not simply the output of the head;
        `accumulator` is then unusable.

    Raises:
        GuardError: the model returns no logits that a gradient flows through.
    """
    head = None
    if closed and parameters.head is not None:
        head = ClosedHead(parameters.head, accumulator, batch.input_ids, batch.completion_mask, temperature)
    samples, width = batch.input_ids.shape
    tap = Tap(parameters.uses, parameters.replays, accumulator, samples, width, checked)
    besides = None if head is None else head.use.module
    with frozen_pass(model), tapped(model, tap, besides), torch.enable_grad():
        if head is None:
            logits = forward_logits(model, batch)
            log_probs, gradient = score_logits(logits.detach(), batch.input_ids, batch.completion_mask, temperature)
            logits.backward(gradient)
        else:
            if (stand_in := _stand_in(model, head, batch)) is None or not head.is_whole(stand_in):
                return None
            log_probs = head.log_probs
    return log_probs, tap.unseen()


def unused(model: nn.Module, names: set[str], batch: TokenBatch) -> set[str]:
    """Those of the trainable parameters `names` that the logits do not depend on, so that their gradient is zero.

    A sharded parameter stands for pieces that only its engine puts together, and is never among them.
    """
    some = {n: p for n, p in model.named_parameters() if n in names and type(p.data) is Tensor and p.numel()}
    if not some:
        return set()
    with frozen_pass(model), torch.enable_grad():
        for p in some.values():
            p.requires_grad_(True)
        logits = forward_logits(model, batch, differentiable=False)
        if not logits.requires_grad:
            return set(some)
        try:
            found = torch.autograd.grad(logits.sum(), list(some.values()), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # reentrant checkpointing cannot tell
            return set()
    return {name for name, gradient in zip(some, found, strict=True) if gradient is None}


def _stand_in(model: nn.Module, head: ClosedHead, batch: TokenBatch) -> Tensor | None:
    """The stand-in for the logits as the model returns it; None if the model changed it or did not return it."""
    try:
        with head.installed():
            logits = forward_logits(model, batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not head.handed_out:
            raise
        return None  # the stand-in cannot be written into
    return logits if head.made(logits) else None


def forward_logits(model: nn.Module, batch: TokenBatch, *, differentiable: bool = True) -> Tensor:
    """Logits [B, T, V] of `model(input_ids=..., attention_mask=...)`, without cache and without labels.

    Where completions share prompts, the model gets a mask [B, 1, T, T], and position ids.

    Raises:
        GuardError: the output holds no such logits, or none that is `differentiable` where that is asked for.
    """
    input_ids, options = batch.input_ids, {"attention_mask": batch.attention_mask}
    if shares_prompts(batch.completion_mask):
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        masks = (batch.attention_mask, batch.completion_mask)
        options = {"attention_mask": shared_attention(*masks, dtype), "position_ids": shared_positions(*masks)}
    accepted = inspect.signature(model.forward).parameters.values()
    takes_cache = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted)
    cache = {"use_cache": False} if takes_cache else {}
    output = model(input_ids=input_ids, **options, **cache)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    if shape is None or len(shape) != 3 or shape[:2] != tuple(input_ids.shape):
        raise GuardError(
            f"Expected logits [{input_ids.shape[0]}, {input_ids.shape[1]}, V] from the model; found "
            f"{type(logits).__name__ if shape is None else list(shape)}. Pass a causal LM whose forward returns "
            "logits: switch off fused heads and losses that skip them."
        )
    if differentiable and not logits.requires_grad:
        raise GuardError(
            "Expected logits through which a gradient flows; found a detached tensor. Pass a model whose forward "
            "does not run under no_grad or inference_mode."
        )
    return logits


def reads_padding(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> bool:
    """Whether the logits of one sample change when it is padded, in two forwards of a few tokens.

    Args:
        model: a language model.
        input_ids: [B, T] int64. attention_mask: [B, T], rows of ones followed by zeros. The sample is the beginning of
            the first one. It is padded with what pads the others, where there is padding.
    """
    alone = input_ids[:1, : min(_PADDED_TOKENS, int(attention_mask[0].sum()))]
    mask, holes = torch.ones_like(alone), input_ids[attention_mask == 0]
    named = getattr(getattr(model, "config", None), "pad_token_id", None)
    padding = torch.full_like(alone, int(holes[0] if len(holes) else alone[0, -1] if named is None else named))
    with sampling_mode(model, seed=0):
        expected = forward_logits(model, _text(alone, mask), differentiable=False)
        padded = _text(torch.cat([alone, padding], 1), torch.cat([mask, 0 * mask], 1))
        found = forward_logits(model, padded, differentiable=False)[:, : alone.shape[1]]
    expected, found = (x.float() - x.float().mean(-1, keepdim=True) for x in (expected, found))
    # At most tokens, so that one which rounding sends to another expert does not count.
    changed = (found - expected).norm(dim=-1) > _ROUNDING * expected.norm(dim=-1)
    return bool(changed.float().mean() > 0.5)


def _text(input_ids: Tensor, attention_mask: Tensor) -> TokenBatch:
    return TokenBatch(input_ids, attention_mask, torch.zeros_like(input_ids), torch.full((len(input_ids),), -1))


def score_logits(
    logits: Tensor, input_ids: Tensor, completion_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(y|x) = sum_t log softmax(logits_{t-1} / temperature)[y_t] over completion tokens, and its gradient.

    The gradient (onehot(y_t) - softmax) / temperature is written down directly, some rows at a time and in
    fp32 (float64 for float64 logits), so no probabilities of the whole batch are kept.

    Args:
        logits: [B, T, V].
        input_ids: [B, T] int64.
        completion_mask: [B, T], above 0 on tokens whose log-probability counts; 0 at t = 0.
        temperature: of the sampling, > 0.

    Returns:
        log-probabilities of the rows [B] in nats, and the gradient of their sum [B, T, V] in the dtype of
        the logits.
    """
    sample, token, position = predictions(completion_mask)
    targets = input_ids[sample, token]
    gradient = torch.zeros_like(logits)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = torch.zeros(logits.shape[0], dtype=wide, device=logits.device)
    step = max(1, _CHUNK_SCALARS // logits.shape[-1])
    for b, t, y in zip(sample.split(step), position.split(step), targets.split(step), strict=True):
        log_p = (logits[b, t].to(wide) / temperature).log_softmax(-1)
        log_probs.index_add_(0, b, log_p.gather(1, y[:, None]).squeeze(1))
        rows = log_p.exp_().neg_()
        rows.scatter_add_(1, y[:, None], rows.new_ones(len(y), 1))
        gradient.index_put_((b, t), rows.div_(temperature).to(gradient.dtype), accumulate=True)
    return log_probs, gradient
