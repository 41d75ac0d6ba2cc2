"""The last hidden layer alone: what of a model stays trainable when gradients are restricted to it.

arXiv 2602.21189 takes its language models' gradients with respect to the last hidden layer. Our reading, since the
text at hand names no parameters: all trainable parameters of the last decoder block (attention, MLP and the norms in
it), and neither the final norm nor the output embedding. With PEFT, the adapters in that block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from passk_guard.utils.errors import GuardError


def last_hidden_layer(model: nn.Module) -> nn.Module:
    """The last block of the stack of decoder blocks: of the `nn.ModuleList` with `config.num_hidden_layers` entries.

    Raises:
        GuardError: the model has no such list, or the block has no trainable parameter.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not depth or not stacks:
        raise GuardError(
            "Expected a model with a list of `config.num_hidden_layers` decoder blocks, to take the last hidden layer "
            f"of; found none in {type(model).__name__}. Leave out `last_layer` and the paper's protocol."
        )
    # A mixture of experts can have as many experts as layers: the stack of blocks is the one that holds the most.
    last: nn.Module = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))[-1]
    if not any(p.requires_grad for p in last.parameters()):
        raise GuardError(
            "Expected trainable parameters in the last hidden layer; found none. With PEFT the adapter has to reach "
            "the last block: leave out `last_layer` and the paper's protocol."
        )
    return last


@contextmanager
def only_last_hidden_layer(model: nn.Module) -> Iterator[None]:
    """Inside, no other parameter requires grad, which is what the sketch goes by; put back on exit.

    Raises:
        GuardError: as `last_hidden_layer`.
    """
    inside = {id(p) for p in last_hidden_layer(model).parameters()}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    for p in outside:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in outside:
            p.requires_grad_(True)
