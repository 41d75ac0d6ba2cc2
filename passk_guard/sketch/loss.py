"""The summed log-probability of each completion, and its gradient with respect to the logits in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_SCALARS = 1 << 24  # logits turned into probabilities at a time: 64 MiB in fp32


def score_logits(
    logits: Tensor, input_ids: Tensor, completion_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(y|x) = sum_t log softmax(logits_{t-1} / temperature)[y_t] over completion tokens, and its gradient.

    The gradient (onehot(y_t) - softmax) / temperature is written down directly, some rows at a time and in
    fp32 (float64 for float64 logits), so no probabilities of the whole batch are kept.

    Args:
        logits: [B, T, V].
        input_ids: [B, T] int64.
        completion_mask: [B, T] bool, tokens whose log-probability counts; False at t = 0.
        temperature: of the sampling, > 0.

    Returns:
        log-probabilities [B] in nats, and the gradient of their sum [B, T, V] in the dtype of
        the logits.
    """
    sample, position = completion_mask[:, 1:].nonzero(as_tuple=True)
    targets = input_ids[sample, position + 1]
    gradient = torch.zeros_like(logits)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = torch.zeros(logits.shape[0], dtype=wide, device=logits.device)
    step = max(1, _CHUNK_SCALARS // logits.shape[-1])
    for b, t, y in zip(sample.split(step), position.split(step), targets.split(step), strict=True):
        log_p = (logits[b, t].to(wide) / temperature).log_softmax(-1)
        log_probs.index_add_(0, b, log_p.gather(1, y[:, None]).squeeze(1))
        rows = log_p.exp_().neg_()
        rows.scatter_add_(1, y[:, None], rows.new_ones(len(y), 1))
        gradient[b, t] = rows.div_(temperature).to(gradient.dtype)
    return log_probs, gradient
