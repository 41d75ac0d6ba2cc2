"""Out of memory in the probe: smaller batches, also later; a failed refresh where one sample is too much."""

import gc
import weakref

import pytest
import torch

from passk_guard.mitigation.engines.protocol import local_inner_products
from passk_guard.mitigation.gradient_guard import StepGuard
from passk_guard.mitigation.protected_direction import Pass1Loss
from passk_guard.probe.out_of_memory import halved, out_of_memory, until_it_fits
from passk_guard.probe.samplers import GenerateSampler
from passk_guard.sketch import ScoreSketcher, token_batches
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks
from tests.faults.harness import PROJECT, At, Texts, add_guard, assert_same, make, train
from tests.helpers.tiny import tiny_grpo_trainer
from tests.mitigation.test_gradient_guard import Engine

ALONE = Ranks(torch.device("cpu"))


def no_room(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def limit_sketches(monkeypatch, tokens, seen):
    """Let the sketcher run out of memory on batches of more tokens, padding included."""
    sketch = ScoreSketcher.sketch

    def limited(self, input_ids, *args, **kwargs):
        seen.append(input_ids.numel())
        if input_ids.numel() > tokens:
            no_room()
        return sketch(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(ScoreSketcher, "sketch", limited)


def test_a_smaller_budget_gives_the_same_estimate_and_is_remembered(references, tmp_path, monkeypatch, caplog):
    runs = []
    for room in (10**9, 100):
        seen = []
        with monkeypatch.context() as patch:
            limit_sketches(patch, room, seen)
            trainer = make("lm", tmp_path / str(room))
            runs.append(train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class))))
    whole, pieces = runs
    assert pieces.failed == [False, False]
    for a, b in zip(whole.guard.memory.history, pieces.guard.memory.history, strict=True):
        assert torch.allclose(a.gram, b.gram, rtol=1e-4, atol=1e-5 * float(a.gram.abs().max()))
        assert float(a.gram.abs().max()) > 0
    too_large = [i for i, tokens in enumerate(seen) if tokens > 100]
    assert too_large, "the fixture must run out of memory"
    fits = seen[max(too_large) + 1 :]
    assert sum(fits) > sum(seen[: max(too_large)]) / 2, "the second refresh began with what had fitted"
    assert caplog.text.count("out of memory in the probe") == len(too_large)
    assert_same(pieces, references.of("lm"))
    assert_same(whole, references.of("lm"))


def test_a_sample_that_does_not_fit_alone_fails_the_refresh(references, tmp_path, monkeypatch):
    seen = []
    limit_sketches(monkeypatch, 1, seen)
    trainer = make("lm", tmp_path)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class), **PROJECT))
    assert run.failed == [True, True]
    assert "CUDA out of memory" in run.of("failed_refresh")[0]["reason"]
    assert len(seen) < 20, "halved, and not lowered one by one"
    assert_same(run, references.of("lm"))


@pytest.mark.parametrize("room", [0, 10])
def test_the_harvest(room, references, tmp_path, monkeypatch):
    original, sizes = Pass1Loss.__call__, []

    def limited(self, model, batch):
        if bool((batch.slots >= 0).any()):
            sizes.append(len(batch.slots))
            if len(batch.slots) > room:
                no_room()
        return original(self, model, batch)

    def projected(folder):
        trainer, protected = make("lm", folder), []
        guard = add_guard(trainer, sampler=Texts(trainer.processing_class), **PROJECT)
        trainer.add_callback(At("on_step_end", 4, lambda: protected.extend(guard._mitigator.steps.protected or ())))
        return train(trainer, guard), protected

    with monkeypatch.context() as patch:
        patch.setattr(Pass1Loss, "__call__", limited)
        run, protected = projected(tmp_path)
    assert max(sizes) > 10
    if room == 0:
        assert run.failed == [True, True]
        assert_same(run, references.of("lm"))
        return
    assert run.failed == [False, False]
    assert [size for size in sizes if size > room] == [96, 48, 24, 12], "the second refresh begins with what fitted"
    _, expected = projected(tmp_path / "whole")
    for a, b in zip(protected, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-8)


def test_generation_in_smaller_batches(references, tmp_path, monkeypatch):
    trainer = make("lm", tmp_path)
    sampler = GenerateSampler(trainer.model, trainer.processing_class, max_new_tokens=4, batch_size=64)
    generate, sizes = type(trainer.model).generate, []

    def limited(self, input_ids=None, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 20:
            no_room()
        return generate(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(trainer.model), "generate", limited)
    run = train(trainer, add_guard(trainer, sampler=sampler))
    assert run.failed == [False, False]
    sizes = sizes[2:]  # the trial of copied caches
    assert sizes[:3] == [64, 32, 16]
    assert max(sizes[3:]) == 16, "remembered"
    assert_same(run, references.of("lm"))


def test_generation_that_never_fits(references, tmp_path, monkeypatch):
    trainer = make("lm", tmp_path)
    guard = add_guard(trainer, **PROJECT)
    assert GenerateSampler(trainer.model, trainer.processing_class, batch_size=1).sample_fewer() is False
    monkeypatch.setattr(type(trainer.model), "generate", no_room)
    run = train(trainer, guard)
    assert run.failed == [True, True]
    assert_same(run, references.of("lm"))


def test_the_trainers_own_generation_in_smaller_batches(tmp_path, monkeypatch):
    trainer = tiny_grpo_trainer(tmp_path, max_steps=1)
    guard = add_guard(trainer)
    sampler, sizes = guard._source.sampler, []
    generate = sampler._generate

    def limited(prompt_ids, *args):
        sizes.append(len(prompt_ids))
        if len(prompt_ids) > 4:
            no_room()
        return generate(prompt_ids, *args)

    monkeypatch.setattr(sampler, "_generate", limited)
    run = train(trainer, guard)
    assert run.failed == [False]
    assert sizes == [8] + [4] * 24


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("no room"), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert out_of_memory(error) is expected
    if error is not None:
        with pytest.raises(FailedRefresh) as raised:
            ALONE.together(lambda: (_ for _ in ()).throw(error))
        assert out_of_memory(raised.value) is expected


def test_another_failure_is_not_tried_again():
    attempts = []

    def attempt():
        attempts.append(1)
        raise FailedRefresh("not finite")

    with pytest.raises(FailedRefresh, match="not finite"):
        until_it_fits(ALONE, attempt, lambda: True)
    assert attempts == [1]


def test_the_tensors_of_a_failed_attempt_are_gone_before_the_next():
    kept = []

    def attempt():
        if kept:
            return kept[0]() is None
        tensor = torch.zeros(10)
        kept.append(weakref.ref(tensor))
        try:
            no_room()
        except torch.OutOfMemoryError as error:
            raise FailedRefresh("no room") from error

    gc.disable()
    try:
        assert until_it_fits(ALONE, attempt, lambda: True)
    finally:
        gc.enable()


def test_halves_hold_the_same_samples():
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    completions = [[8], [9, 9], [10], [11]]
    (batch,) = token_batches(prompts, completions, [0, 1, 2, 3], max_tokens=100, pad_token_id=0, device="cpu")
    quarters = halved(halved([batch]))
    assert [len(q.slots) for q in quarters] == [1] * 4
    rows = sorted((int(q.slots[0]), q.input_ids[0][q.attention_mask[0].bool()].tolist()) for q in quarters)
    assert rows == [(i, p + c) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
    for q in quarters:
        assert q.completion_mask.sum() == len(completions[int(q.slots[0])])
        assert q.attention_mask.sum() == q.attention_mask.numel(), "no padding is left"
    eighths = halved(quarters)
    assert [int(b.slots[0]) for b in eighths].count(-1) == 4, "the other half of one sample is a filler"


def test_a_rank_that_cannot_compute_its_inner_products_leaves_the_step_unchanged_on_all():
    class NoRoom(torch.Tensor):
        def detach(self):
            no_room()

    part = [torch.ones(2)]
    broken = [torch.ones(2).as_subclass(NoRoom)]
    assert bool(local_inner_products([(part, part), (broken, part)], torch.device("cpu")).isnan().all())
    engine, logged = Engine([1.0, -2.0]), []
    engine.inner_products = lambda pairs: [float("nan")] * len(pairs)
    guard = StepGuard(engine, ALONE, gamma=0.2, average=0.0, dtype=torch.float32, on_failure=logged.append)
    guard.install()
    guard.open, guard.protected = True, [torch.tensor([0.0, 3.0])]
    engine.before_step()
    assert engine.parts[0].tolist() == [1.0, -2.0]
    assert len(logged) == 1
