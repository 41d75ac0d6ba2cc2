"""Small modules that are not Hugging Face models: float64 throughout, odd shapes, weights outside modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

VOCAB = 23


class PlainLM(nn.Module):
    """Embedding, causal mean, an RMSNorm, an MLP called on flattened tokens, and a tied head with a bias."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, width: int = 12, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.positions = nn.Embedding(32, width)
        self.norm = norm(width)
        self.up = nn.Linear(width, 20)
        self.down = nn.Linear(20, width, bias=False)
        self.head = nn.Linear(width, vocab)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0, 0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch, width = input_ids.shape
        x = self.embed(input_ids)
        x += self.positions(torch.arange(width))  # in place, and without a batch dimension
        x = x + torch.tanh(x).cumsum(1) / torch.arange(1, width + 1)[:, None]
        hidden = self.norm(x).view(batch * width, -1)
        return self.head(x + self.down(torch.tanh(self.up(hidden))).view(batch, width, -1))


class ScaledLM(PlainLM):
    """The same with a gain that is a bare nn.Parameter, larger than all the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(64, 64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask) * self.gain.mean()


class FusedHeadLM(PlainLM):
    """The same with a head that reads its weight without calling its module."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1])))
        return nn.functional.linear(self.down(self.up(x)), self.head.weight, self.head.bias)


class NamedHeadLM(PlainLM):
    """The same with a named head. `finish` is applied to the logits."""

    def __init__(self, finish: Callable[[Tensor], Tensor] = lambda logits: logits, vocab: int = VOCAB) -> None:
        super().__init__(vocab=vocab)
        self.finish = finish

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.finish(super().forward(input_ids, attention_mask))


class TwiceHeadLM(NamedHeadLM):
    """Calls its head a second time, on something else, and uses both."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        first = self.head(self.norm(self.embed(input_ids)))
        return super().forward(input_ids, attention_mask) + 0.1 * first


class SequenceFirstLM(PlainLM):
    """Calls one of its layers on [T, B, d]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1])))
        return self.head(self.down(torch.tanh(self.up(x.transpose(0, 1)).transpose(0, 1))))


class UnmaskedLM(PlainLM):
    """Takes the mean over all tokens, padding and later ones among them."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(self.norm(x + torch.tanh(x).mean(1, keepdim=True)))


class BrokenLM(PlainLM):
    """Raises in the middle of its forward."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.up(self.norm(self.embed(input_ids)))
        raise RuntimeError("broken on purpose")


class GatedRMSNorm(nn.RMSNorm):
    """Named like an RMSNorm, and something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x)


class RestlessLM(PlainLM):
    """Draws random numbers in its forward, and does nothing with them."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        torch.rand(3)
        return super().forward(input_ids, attention_mask)


class DroppingLayer(GradientCheckpointingLayer):
    """Hugging Face's checkpointing layer with a separate dropout under an unusual name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.settings = {"p": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(torch.tanh(self.linear(x)), **self.settings, training=self.training)


class DroppingLM(PlainLM):
    """The plain model with two such layers, checkpointed."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DroppingLayer(12), DroppingLayer(12)])
        for layer in self.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.down(self.up(self.norm(x + self.positions(torch.arange(x.shape[1]))))))


class HandCheckpointedLM(PlainLM):
    """Checkpoints its MLP by itself, in eval mode too."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))

        def block(y: Tensor) -> Tensor:
            return y + self.down(torch.tanh(self.up(self.norm(y))))

        x = checkpoint(block, x, use_reentrant=False)
        x = checkpoint(block, x, use_reentrant=True)  # the same modules a second time
        return self.head(x)
