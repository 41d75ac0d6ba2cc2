"""The model and the batch that all methods get, and exact cosines of its per-sample gradients to hold them against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.sketch_speed import build_batch, build_model, cosines, train

LAYERS, VOCAB, SAMPLES, WIDTH, PROMPT, TRAIN_STEPS = 6, 8192, 16, 128, 16, 30


@dataclass(frozen=True)
class Problem:
    """A batch of completions, of which each method takes the gradient of log pi(y_i | x_i) for every i.

    Attributes:
        model: trained for a few steps: with random weights gradients do not resemble each other, and every method
            looks better.
        input_ids: [B, T], prompt directly followed by completion; nothing is padded.
        completion_mask: [B, T].
        exact: cosines of all pairs of samples, from one backward pass a sample.
        exact_linear: of the linear layers' weights and biases alone, of a tied matrix what the head adds.
        sizes: numbers of each trainable parameter; a tied one stands in it once for each of its uses.
    """

    model: nn.Module
    input_ids: Tensor
    completion_mask: Tensor
    exact: Tensor
    exact_linear: Tensor
    sizes: dict[str, int]

    def losses(self, logits: Tensor) -> Tensor:
        """[B] -log pi(y_i | x_i)."""
        return sample_losses(logits, self.input_ids, self.completion_mask)


def sample_losses(logits: Tensor, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """[B] -log pi(y_i | x_i), a sum over the completion's tokens."""
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
    taken = log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return -(taken * completion_mask[:, 1:]).sum(1)


def fresh_model() -> nn.Module:
    return build_model(LAYERS, VOCAB, "cpu", torch.float32)


def prepare(path: Path) -> None:
    """Train the model, take exact cosines, and leave all that `load` needs in a file."""
    model = fresh_model()
    batch = build_batch(SAMPLES, WIDTH, PROMPT, VOCAB, SAMPLES, "cpu")
    train(model, TRAIN_STEPS, VOCAB, "cpu")
    model.eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # its two uses apart
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in (m.weight, m.bias) if p is not None}
    whole, of_linear = [], []
    for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        model.zero_grad(set_to_none=True)
        sample_losses(model(input_ids=ids[None]).logits, ids[None], mask[None]).sum().backward()
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        others = [p for p in model.parameters() if p is not embedding and p is not head]
        whole.append(torch.cat([(embedding.grad + head.grad).flatten(), *(p.grad.flatten() for p in others)]))
        of_linear.append(torch.cat([p.grad.flatten() for p in model.parameters() if id(p) in linear]))
    exact = {"exact": cosines(torch.stack(whole)), "exact_linear": cosines(torch.stack(of_linear))}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    model.tie_weights()
    saved = {name: batch[name] for name in ("input_ids", "completion_mask")}
    torch.save({"weights": model.state_dict(), "sizes": sizes, **exact, **saved}, path)


def load(path: Path) -> Problem:
    saved = torch.load(path)
    model = fresh_model()
    model.load_state_dict(saved.pop("weights"))
    return Problem(model.eval(), **saved)
