"""The sketch on the device at hand: on the CPU in the quick suite, on a GPU with `pytest -m gpu`."""

import json

import pytest
import torch

from benchmarks import gpu_shapes
from benchmarks.sketch_speed import peak_bytes
from passk_guard.sketch import ScoreSketcher
from tests.helpers.devices import DEVICES
from tests.helpers.tiny import tiny_model
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error

VOCAB = 2000


def moved(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def sketch(model, batch, method="kronecker", dim=1024):
    return ScoreSketcher(model, dim=dim, method=method).sketch(**batch, num_slots=6).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["identity", "kronecker", "countsketch"])
def test_every_device_gives_the_sketch_of_the_same_projections(method, device, monkeypatch):
    """On the CPU against a narrow side written out as a matrix, which is how a GPU applies it."""
    model, batch = tiny_model("qwen2", vocab_size=200), ragged_batch(vocab=200)
    expected = sketch(model, batch, method)
    if device == "cpu":
        monkeypatch.setattr("passk_guard.sketch.projections.FoldedSide.__call__", lambda self, x: x @ self._matrix)
    assert relative_error(sketch(model.to(device), moved(batch, device), method), expected) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_bf16_with_sdpa_stays_close_to_exact_gradients_in_fp32(checkpointing, device):
    model, batch = tiny_model("qwen2", initializer_range=0.1, attn_implementation="sdpa"), ragged_batch()
    expected = oracle_sketch(model, batch, 6)
    model = model.to(device, torch.bfloat16).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert relative_error(sketch(model, moved(batch, device), "identity"), expected) < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_the_closed_form_of_the_head_needs_less_memory(device, monkeypatch):
    monkeypatch.setattr("passk_guard.sketch.head._CHUNK_SCALARS", {})
    monkeypatch.setattr("passk_guard.sketch.head._CHUNK_ELSEWHERE", 1)
    monkeypatch.setattr("passk_guard.sketch.head._FEWEST_TOKENS", 16)
    model = tiny_model("qwen2", vocab_size=VOCAB).to(device)
    batch = moved(ragged_batch(vocab=VOCAB, samples=48, slots=[i % 6 for i in range(48)]), device)
    logits = 4 * batch["input_ids"].numel() * VOCAB
    closed, plain = (ScoreSketcher(model, dim=64) for _ in range(2))
    plain._closed = False
    peaks = []
    for sketcher in (closed, plain):
        sketcher.sketch(**batch, num_slots=6)  # draws the projections, and whatever else is kept
        peaks.append(peak_bytes(lambda s=sketcher: s.sketch(**batch, num_slots=6), device))
    assert peaks[1] - peaks[0] > logits


@pytest.mark.parametrize("device", DEVICES)
def test_the_benchmark_of_large_models_runs(device, tmp_path):
    options = f"--shape tiny --width 32 --repeats 1 --seeds 2 --pairs-of 3 --train-steps 2 --device {device}"
    assert gpu_shapes.main([*options.split(), "--json", str(tmp_path / "found.json")]) == 0
    *speed, last = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["checkpointing"] for row in speed] == [False, True]
    for row in speed:
        assert set(row["seconds"]) == set(row["peak_bytes"]) == set(row["ratios"]) == set(gpu_shapes.RUNS)
        assert min(row["seconds"].values()) > 0
        assert min(row["peak_bytes"].values()) > 0
    close = last["accuracy"]
    assert len(close["cosines"]) == 3
    assert close["k_eff"] > 500
    assert 0 < close["exact_cosine_shift"] < 0.05
    assert 0 < close["sketched_cosine_shift"] < 0.05


def test_the_benchmarks_exact_cosines_are_those_of_the_oracle():
    model, batch = tiny_model("qwen2").eval(), ragged_batch()
    batch = {name: tensor[:3, :4] if tensor.dim() == 2 else tensor[:3] for name, tensor in batch.items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["completion_mask"] = (torch.arange(4) >= 2).long().expand(3, 4).contiguous()
    rows = torch.nn.functional.normalize(oracle_sketch(model, batch, 3).double(), dim=1)
    pairs = torch.triu_indices(3, 3, 1)
    torch.testing.assert_close(
        gpu_shapes.exact_cosines(model, batch), (rows @ rows.T)[pairs[0], pairs[1]], atol=1e-5, rtol=1e-5
    )


def test_the_target_is_set_for_large_models_only():
    row = {"seconds": {"plain": 1.0, "kronecker": 0.81}}
    assert gpu_shapes.too_slow(1_500_000_000, row)
    assert not gpu_shapes.too_slow(500_000_000, row)
    assert not gpu_shapes.too_slow(1_500_000_000, {"seconds": {"plain": 1.0, "kronecker": 0.79}})
    assert not gpu_shapes.too_slow(1_500_000_000, {"seconds": {"kronecker": 0.81}})  # the plain pass did not fit


def test_shapes_have_the_sizes_of_their_names():
    for name, count in (("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("7b", 7_615_616_512)):
        model = gpu_shapes.build_model(gpu_shapes.SHAPES[name], "meta", torch.bfloat16, "sdpa")
        assert sum(p.numel() for p in model.parameters()) == count
