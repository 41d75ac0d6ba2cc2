"""Gradients of the last hidden layer against autograd, sample by sample."""

import pytest
import torch

from passk_guard import GuardError
from passk_guard.analysis.load import last_hidden_layer, only_last_hidden_layer
from passk_guard.analysis.store import RolloutStore
from passk_guard.probe.refresh import Refresher
from tests.analysis.cases import QUICK, PromptSampler, quick
from tests.helpers.tiny import digit_reward, probe_rows, tiny_model, tiny_tokenizer


def score_sums(model, parameters, rows):
    """[2m, d] sums of grad log pi(y|x) over right and wrong completions, one backward pass a completion."""
    samples = PromptSampler().sample(rows, QUICK["num_samples"], 0)
    sums = torch.zeros(2 * len(rows), sum(p.numel() for p in parameters), dtype=torch.float64)
    rewards = digit_reward(samples.completions)
    for i, (prompt, completion) in enumerate(zip(samples.prompt_ids, samples.completion_ids, strict=True)):
        ids = torch.tensor([prompt + completion])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        positions = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        value = log_probs[positions, ids[0, len(prompt) :]].sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
        sums[i // QUICK["num_samples"] + (0 if rewards[i] else len(rows))] += gradient.double()
    return sums


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_the_gram_matrix_is_that_of_the_last_block(kind, monkeypatch):
    model, rows, grams = tiny_model(kind), probe_rows(6), []
    keep = Refresher.run

    def kept(self, *args, **kwargs):
        grams.append(keep(self, *args, **kwargs).probe)
        return keep(self, *args, **kwargs)

    monkeypatch.setattr(Refresher, "run", kept)
    analysis = quick(model, rows=rows, last_layer=True, sketch_method="identity")
    block = model.transformer.h[-1] if kind == "gpt2" else model.model.layers[-1]
    parameters = list(block.parameters())
    (probe,) = grams
    sums = score_sums(model, parameters, rows)
    mixed = (probe.num_correct > 0) & (probe.num_correct < probe.num_samples)
    sums = sums * torch.cat([mixed, mixed])[:, None]
    scale = float((sums @ sums.T).abs().max())
    assert torch.allclose(probe.gram, sums @ sums.T, rtol=1e-4, atol=1e-5 * scale)
    assert analysis.sketch.parameters == "last hidden layer"
    assert analysis.sketch.total == sum(p.numel() for p in parameters)


def test_what_was_frozen_stays_frozen():
    model = tiny_model()
    model.model.layers[-1].mlp.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with only_last_hidden_layer(model):
        inside = {name for name, p in model.named_parameters() if p.requires_grad}
    assert inside == {n for n, on in before.items() if on and n.startswith("model.layers.1.")}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_models_without_one_are_refused_before_anything_is_sampled():
    model = tiny_model()
    model.model.layers[-1].requires_grad_(False)
    sampler = PromptSampler()
    with pytest.raises(GuardError, match="trainable parameters in the last hidden layer"):
        quick(model, last_layer=True, sampler=sampler)
    assert sampler.sampled == []
    with pytest.raises(GuardError, match="found none in Linear"):
        last_hidden_layer(torch.nn.Linear(2, 2))


def test_a_store_without_a_folder_keeps_nothing():
    store = RolloutStore(None)
    store.prepare({})
    store.append([])
    assert store.read() == {}
    assert tiny_tokenizer().pad_token_id == 0
