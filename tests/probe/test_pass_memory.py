"""The size of a pass: what a token takes, and what follows from the free memory."""

import pytest
import torch
from torch import nn

from passk_guard.mitigation.protected_direction import Pass1Loss
from passk_guard.probe import pass_memory
from passk_guard.probe.pass_memory import bytes_per_token, choose_tokens, free_bytes, passes_of
from passk_guard.sketch import ScoreSketcher, token_batches
from passk_guard.utils.ranks import Ranks
from tests.helpers.live_bytes import most_alive
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
WIDE = {
    "llama": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 500},
    "gpt2": {"n_embd": 64, "n_layer": 4, "vocab_size": 500},
}


@pytest.mark.parametrize("direction", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_a_token_takes_is_near_the_peak_of_a_pass(kind, direction):
    """The slope of the peak over the tokens of a pass."""
    model = tiny_model(kind, **WIDE[kind])
    model.set_attn_implementation("sdpa")
    sketcher = ScoreSketcher(model, dim=256)

    def peak(samples):
        ids = torch.randint(3, 70, (samples, 40), generator=torch.Generator().manual_seed(0)).tolist()
        parts = ([row[:20] for row in ids], [row[20:] for row in ids], [0] * samples)
        (batch,) = token_batches(*parts, max_tokens=40 * samples, pad_token_id=0, device="cpu")
        if direction:
            model.requires_grad_(True)
            return most_alive(lambda: Pass1Loss(torch.ones(2), 1.0, 1.0)(model, batch).backward())
        tensors = (batch.input_ids, batch.attention_mask, batch.completion_mask, batch.slots)
        return most_alive(lambda: sketcher.sketch(*tensors, 1))

    peak(10)
    measured = (peak(60) - peak(20)) / (40 * 40)
    assert 0.6 < measured / bytes_per_token(model, direction=direction) < 1.3


class Two(Ranks):
    """This rank and another one, which fits `other` tokens."""

    def __init__(self, other):
        super().__init__(CPU)
        self.other = other

    def max(self, value):
        return max(value, -self.other)


@pytest.mark.parametrize(
    ("room", "other", "tokens"),
    [(10**6, 16384, 16384), (3000, 16384, 2048), (4095, 16384, 2048), (3000, 1024, 1024), (1, 16384, 512)],
)
def test_a_pass_takes_a_third_of_the_free_memory_in_round_numbers_alike_on_every_rank(room, other, tokens, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(pass_memory, "free_bytes", lambda device: 3 * room * bytes_per_token(model, direction=False))
    assert choose_tokens(model, Two(other), direction=False) == tokens


def test_free_memory_is_that_of_the_container_and_shared_among_the_ranks_of_a_host(monkeypatch, tmp_path):
    (tmp_path / "limit").write_text("5000000")
    (tmp_path / "used").write_text("1000000")
    monkeypatch.setattr(pass_memory, "_CONTROL_GROUPS", ((tmp_path / "limit", tmp_path / "used"), ("/no", "/group")))
    assert free_bytes(CPU) == 4_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 1_000_000
    (tmp_path / "limit").write_text("max\n")
    assert free_bytes(CPU) > 10_000_000


def test_a_model_without_a_config_has_the_largest_pass():
    model = nn.Linear(2, 2)
    assert choose_tokens(model, Ranks(CPU), direction=True) == 16384
    found = passes_of(16384, tiny_model(), direction=False)
    assert found == "passes of at most 16,384 tokens, about 0.039 GiB of memory"
