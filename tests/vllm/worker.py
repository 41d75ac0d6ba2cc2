"""One of two ranks that share one vLLM: `python -m tests.vllm.worker guarded|unguarded FOLDER` under torchrun."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from tests.distributed.launch import leave
from tests.vllm.runs import use_one_engine, vllm_trainer, watched, weights_of

RANK = int(os.environ["RANK"])


class Patch:
    setattr = staticmethod(setattr)


def trained(folder: Path, guarded: bool) -> tuple[str, int]:
    """Digest of the weights and number of successful refreshes."""
    torch.manual_seed(0)
    trainer = vllm_trainer(folder, folder.parent / "model", vllm_tensor_parallel_size=2, max_steps=2)
    guard = watched(trainer) if guarded else None
    trainer.train()
    content = b"".join(p.numpy().tobytes() for p in weights_of(trainer).values())
    return hashlib.sha256(content).hexdigest(), 0 if guard is None else len(guard.memory.history)


if __name__ == "__main__":
    use_one_engine(Patch)
    folder = Path(sys.argv[2])
    (folder / f"rank{RANK}.json").write_text(json.dumps(trained(folder, sys.argv[1] == "guarded")))
    leave()
