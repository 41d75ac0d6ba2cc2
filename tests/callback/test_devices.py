"""Observing on the device at hand: a guarded GRPO run is the unguarded one, bit for bit."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.callback.test_guard import guard_of
from tests.helpers.devices import CUDA
from tests.helpers.tiny import tiny_grpo_trainer, tiny_model

FLASH = pytest.mark.skipif(not is_flash_attn_2_available(), reason="no flash attention")
ATTENTION = ["eager", "sdpa", pytest.param("flash_attention_2", marks=FLASH)]
CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


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


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["kept", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_observing_in_bf16_is_bit_for_bit(attention, checkpointing, device, tmp_path):
    without, rows, _ = run(tmp_path / "without", device, False, attention, checkpointing)
    weights, guarded_rows, guard = run(tmp_path / "with", device, True, attention, checkpointing)
    assert guard.memory.failures == 0
    assert guard.memory.account.refreshes == 3
    assert rows == guarded_rows
    for name, weight in without.items():
        assert torch.equal(weight, weights[name]), name
