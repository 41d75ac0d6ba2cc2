"""How many tokens one pass of the probe may have: from the memory that is free and what a token takes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from passk_guard.sketch import head_of
from passk_guard.utils.ranks import Ranks

MOST_TOKENS, FEWEST_TOKENS = 16384, 512
_SHARE = 1 / 3  # of the free memory: gradients and the optimizer's state have yet to come when a run begins
_CONTROL_GROUPS = (  # limit of a container, and what it uses
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def bytes_per_token(model: Any, *, direction: bool) -> int:
    r"""About what a token takes in a pass of the sketch or of the protected direction, at its peak.

    In L layers of width h and inner width f, autograd keeps about $L (10 h + 5 f)$ numbers of the model's size. Logits
    over V token ids, their gradient and copies are $5 V$ numbers in float32. The sketch forms none of them where it
    knows the head; the direction does. Attention that keeps its weights takes more, and checkpointing less.

    Args:
        model: a causal LM, with the config of transformers where it has one.
        direction: whether the protected direction is harvested.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
    width = getattr(text, "hidden_size", None) or 0
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    kept = size * (getattr(text, "num_hidden_layers", None) or 0) * (10 * width + 5 * inner)
    logits = 4 * 5 * (getattr(text, "vocab_size", None) or 0)
    return int(kept + (logits if direction or head_of(model) is None else 0))


def passes_of(tokens: int, model: Any, *, direction: bool) -> str:
    """The size of a pass and its expected peak, for the line at the start of a run."""
    peak = tokens * bytes_per_token(model, direction=direction) / 2**30
    return f"passes of at most {tokens:,} tokens, about {peak:.2g} GiB of memory"


def choose_tokens(model: nn.Module, ranks: Ranks, *, direction: bool) -> int:
    """Tokens of a pass that a third of the free memory holds, as a power of two in 512..16384; the same on every rank.

    Rounded and bounded, so that it rarely depends on what else the machine does. Memory that runs out in spite of it
    makes passes smaller (see `until_it_fits`) where it raises an error: on a CPU the process is killed.
    """
    fits = free_bytes(ranks.device) * _SHARE / max(1, bytes_per_token(model, direction=direction))
    own = 2 ** int(math.log2(max(1.0, fits)))
    return -ranks.max(-max(FEWEST_TOKENS, min(MOST_TOKENS, own)))


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on the device: a GPU's, or its share of the host's or the container's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    free = int(psutil.virtual_memory().available)
    for limit, used in _CONTROL_GROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(0, free) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
