"""Observing on the device at hand: a guarded GRPO run is the unguarded one, bit for bit."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.callback.test_guard import guard_of
from tests.helpers.devices import CUDA
from tests.helpers.tiny import tiny_grpo_trainer, tiny_model

FLASH = pytest.mark.skipif(not is_flash_attn_2_available(), reason="no flash attention")
ATTENTION = [("eager", []), ("sdpa", []), ("flash_attention_2", [FLASH])]
CHECKPOINTING = {"kept": None, "reentrant": {"use_reentrant": True}, "non_reentrant": {"use_reentrant": False}}
CASES = [pytest.param("cpu", "sdpa", "non_reentrant", marks=pytest.mark.slow)]
CASES += [
    pytest.param("cuda", name, kept, marks=[*CUDA.marks, *marks]) for name, marks in ATTENTION for kept in CHECKPOINTING
]


def run(folder, device, guarded, attention, checkpointing):
    """Weights and log rows of a run of three steps in bf16, and its guard."""
    model = tiny_model(hidden_size=64, attention_dropout=0.2, attn_implementation=attention)
    on_cuda = device == "cuda"
    trainer = tiny_grpo_trainer(
        folder,
        model=model.to(torch.bfloat16) if attention == "flash_attention_2" else model,
        max_steps=3,
        use_cpu=not on_cuda,
        bf16=True,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=checkpointing,
    )
    guard = guard_of(trainer, refresh_steps=1) if guarded else None
    trainer.train()
    weights = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
    rows = [{k: v for k, v in row.items() if k in ("loss", "grad_norm", "reward")} for row in trainer.state.log_history]
    return weights, rows, guard


@pytest.mark.parametrize(("device", "attention", "checkpointing"), CASES)
def test_observing_in_bf16_is_bit_for_bit(device, attention, checkpointing, tmp_path):
    kept = CHECKPOINTING[checkpointing]
    without, rows, _ = run(tmp_path / "without", device, False, attention, kept)
    weights, guarded_rows, guard = run(tmp_path / "with", device, True, attention, kept)
    assert guard.memory.failures == 0
    assert guard.memory.account.refreshes == 3
    assert rows == guarded_rows
    for name, weight in without.items():
        assert torch.equal(weight, weights[name]), name
