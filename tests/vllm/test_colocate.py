"""The guard on real vLLM in the trainer's process: it observes without a trace, and weighs what vLLM samples.

vLLM samples these float32 models in bfloat16, its default on a CPU. That is a real mismatch of sampler and model.
"""

import json

import pytest
import torch
from peft import LoraConfig

from passk_guard.probe.samplers import TRLSampler
from passk_guard.utils.errors import GuardError
from passk_guard.utils.ranks import Ranks
from tests.helpers.tiny import probe_rows
from tests.vllm.runs import vllm_trainer, watched, weights_of

LORA = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
RUNS = {
    "grpo": {},
    "rloo": {"kind": "rloo"},
    "temperature": {"temperature": 0.7},
    "off-policy": {"num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
    "bf16": {"bf16": True},
    "adapter": {"peft_config": LoraConfig(**LORA)},
    "adapter off-policy": {"peft_config": LoraConfig(**LORA), "num_iterations": 2},
}


def trained(folder, weights, guarded, settings, **guard):
    torch.manual_seed(0)
    trainer = vllm_trainer(folder, weights, **settings)
    if guarded:
        watched(trainer, **guard)
    trainer.train()
    rows = [{k: v for k, v in row.items() if k in ("loss", "grad_norm", "reward")} for row in trainer.state.log_history]
    return weights_of(trainer), rows, trainer


def refreshes(folder):
    events = [json.loads(line) for line in (folder / "passk_guard.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] in ("refresh", "failed_refresh")]


@pytest.mark.parametrize("name", RUNS)
def test_training_is_bit_for_bit_the_same(name, weights, tmp_path):
    plain, rows, _ = trained(tmp_path / "without", weights, False, RUNS[name])
    guarded, guarded_rows, _ = trained(tmp_path / "with", weights, True, RUNS[name])
    assert [event["event"] for event in refreshes(tmp_path / "with")] == ["refresh"] * 4
    assert rows == guarded_rows
    assert all(torch.equal(plain[name], guarded[name]) for name in plain)


def test_the_training_batch_as_probe(weights, tmp_path):
    plain, *_ = trained(tmp_path / "without", weights, False, {})
    settings = {"source": "training_batch", "num_samples": 4}
    guarded, *_ = trained(tmp_path / "with", weights, True, {}, **settings)
    assert all(torch.equal(plain[name], guarded[name]) for name in plain)
    assert {event["event"] for event in refreshes(tmp_path / "with")} == {"refresh"}


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_weights_are_the_ratios_of_model_and_sampler(kind, temperature, weights, tmp_path, monkeypatch):
    seen, sample = [], TRLSampler.sample
    monkeypatch.setattr(TRLSampler, "sample", lambda *a: seen.append(sample(*a)) or seen[-1])
    settings = {"kind": kind, "temperature": temperature, "max_steps": 1, "learning_rate": 0.0}
    _, _, trainer = trained(tmp_path, weights, True, settings)
    [event] = refreshes(tmp_path)
    [samples] = seen
    correct = [any(ch.isdigit() for ch in text) for text in samples.completions]
    logs = []
    for x in range(0, 96, 8):  # the prompts that have a gradient
        if 0 < sum(correct[x : x + 8]) < 8:
            logs += [
                of_the_model(trainer.model, samples, i, temperature) - samples.log_probs[i] for i in range(x, x + 8)
            ]
    mismatch = torch.tensor(logs).square().mean().sqrt()
    assert 0.005 < mismatch < 0.3
    assert event["sampler_mismatch"] == pytest.approx(float(mismatch), rel=1e-3)
    assert 0.9 < event["sampler_effective_samples"] < 1


@torch.no_grad()
def of_the_model(model, samples, i, temperature):
    """log pi of one completion, by a pass of its own."""
    prompt, completion = samples.prompt_ids[i], samples.completion_ids[i]
    logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    return float((logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())


@pytest.mark.parametrize(
    "given", [{"temperature": 2.0}, {"structured_outputs": {"regex": "[0-9a-m]+"}}], ids=["temperature", "structure"]
)
def test_settings_that_vllm_gets_later_are_found_by_their_effect(given, weights, tmp_path):
    """As when a scheduler of the user's sets them, or a server has its own."""
    trainer = vllm_trainer(tmp_path, weights)
    watched(trainer)
    trainer.vllm_generation.generation_kwargs.update(given)
    trainer.train()
    found = refreshes(tmp_path)
    assert {event["event"] for event in found} == {"failed_refresh"}
    assert "the sampler and the model disagree" in found[0]["reason"]


def test_a_temperature_in_generation_kwargs_is_refused(weights, tmp_path):
    with pytest.raises(GuardError, match=r"found 2\.0 in `generation_kwargs`"):
        watched(vllm_trainer(tmp_path, weights, generation_kwargs={"temperature": 2.0}))


def test_a_seed_gives_the_same_samples_and_another_others(weights, tmp_path):
    """Ranks have seeds of their own, for numpy too, which vLLM's runner for GPUs draws from."""
    import numpy

    trainer, drawn = vllm_trainer(tmp_path, weights), []
    generate = trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda *a, **k: drawn.append(numpy.random.rand()) or generate(*a, **k)
    one, again, other = (TRLSampler(trainer).sample(probe_rows(4), 8, seed) for seed in (3, 3, 4))
    assert one == again
    assert one.completion_ids != other.completion_ids
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_group_of_one_process_is_one_process(weights, tmp_path):
    """vLLM opens a process group: whatever asks whether there is one meets it."""
    vllm_trainer(tmp_path, weights)
    assert torch.distributed.is_initialized()
    assert torch.distributed.get_world_size() == 1
    assert Ranks(torch.device("cpu")).count == 1
    trainer = vllm_trainer(tmp_path / "project", weights)
    guard = watched(trainer, mitigation="project", gate="always")
    trainer.train()
    assert {event["event"] for event in refreshes(tmp_path / "project")} == {"refresh"}
    assert guard.memory.failures == 0
    assert any("passk_guard/mitigated" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_failing_call_leaves_training_as_it_was(adapter, weights, tmp_path):
    """The trainer sends its weights again, since what vLLM has of them is not known."""
    settings = {"peft_config": LoraConfig(**LORA), "num_iterations": 2} if adapter else {}
    plain, _, _ = trained(tmp_path / "without", weights, False, settings)
    trainer = vllm_trainer(tmp_path / "with", weights, **settings)
    guard = watched(trainer)
    sync, probing = trainer.vllm_generation.sync_weights, []
    refresh = guard._refresh
    guard._refresh = lambda *a: (probing.append(1), refresh(*a), probing.clear())

    def fails():
        if not probing:
            return sync()
        if adapter:
            trainer.model.merge_adapter()
        raise ConnectionError("the server is gone")

    trainer.vllm_generation.sync_weights = fails
    torch.manual_seed(0)
    trainer.train()
    assert [event["event"] for event in refreshes(tmp_path / "with")] == ["failed_refresh"] * 4
    assert "ConnectionError: the server is gone" in refreshes(tmp_path / "with")[0]["reason"]
    guarded = weights_of(trainer)
    assert all(torch.equal(plain[name], guarded[name]) for name in plain)
