"""One refresh: which samples are sketched, into which row, and what is left out."""

import pytest
import torch

from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresher
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks


class Recorder:
    """A sketcher that scores sample i, of prompt token 10 + i, with 2^i: a sum of them names its samples."""

    dim = 8

    def __init__(self):
        self.sketched, self.seeds, self.most_slots = [], [], 0

    def reseed(self, seed):
        self.seeds.append(seed)

    def sketch(self, input_ids, attention_mask, completion_mask, slots, num_slots, temperature=1.0, log_probs=None):
        self.temperature, self.most_slots = temperature, max(self.most_slots, num_slots)
        rows = torch.zeros(num_slots, self.dim)
        for ids, attended, slot in zip(input_ids, attention_mask, slots, strict=True):
            self.sketched.append(tuple(ids[attended.bool()].tolist()))
            if slot >= 0:
                rows[slot] += 2.0 ** (int(ids[0]) - 10)
        return rows


def rollouts(index, temperature=0.7):
    size = len(index)
    return Rollouts(
        rows=[{}] * size,
        prompt_index=index,
        prompt_ids=[[10 + i] for i in range(size)],
        completion_ids=[[2]] * size,
        completions=["x"] * size,
        num_prompts=max(index) + 1,
        temperature=temperature,
    )


def refresh(index, correct, k=2, keys=(), max_tokens=4, **outcomes):
    sketcher = Recorder()
    refresher = Refresher(sketcher, Ranks(torch.device("cpu")), k, max_tokens, 0)
    found = Outcomes(torch.tensor(correct, dtype=torch.int8), **outcomes)
    done = refresher.run(lambda: (rollouts(index), found), keys, 5)
    return (done.probe, done.remark), sketcher


def test_each_sample_goes_to_the_row_of_its_prompt_and_outcome():
    (probe, remark), sketcher = refresh([0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 1, 0])
    assert sorted(sketcher.sketched) == [(10 + i, 2) for i in range(6)]
    sums = torch.tensor([1.0, 8.0 + 16.0, 2.0 + 4.0, 32.0], dtype=torch.float64)
    assert torch.equal(probe.gram, 8 * sums[:, None] * sums)
    assert probe.num_samples.tolist() == [3, 3]
    assert probe.num_correct.tolist() == [1, 2]
    assert remark is None
    assert sketcher.seeds == [5]
    assert sketcher.temperature == 0.7


def test_prompts_without_a_gradient_are_not_sketched_but_counted():
    (probe, _), sketcher = refresh([0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 1, 0])
    assert sorted(sketcher.sketched) == [(14, 2), (15, 2)]
    assert probe.gram.diagonal().tolist() == [0, 0, 8 * 16.0**2, 0, 0, 8 * 32.0**2]
    assert probe.num_samples.tolist() == [2, 2, 2]
    assert probe.num_correct.tolist() == [2, 0, 1]


def test_prompts_with_too_few_verdicts_are_left_out():
    (probe, remark), sketcher = refresh(
        [0, 0, 0, 1, 1, 1], [1, -1, -1, 1, 0, -1], keys=["a", "b"], failures=3, reason="E: x"
    )
    assert probe.num_samples.tolist() == [2]
    assert probe.prompt_keys == ["b"]
    assert sorted(sketcher.sketched) == [(13, 2), (14, 2)]
    assert probe.gram.diagonal().tolist() == [8 * 8.0**2, 8 * 16.0**2]
    assert "3 samples have no reward (E: x)" in remark
    assert "1 prompts had fewer than 2" in remark


def test_fillers_are_not_counted():
    (probe, _), sketcher = refresh([0, 0, -1, -1], [1, 0, 1, 0])
    assert probe.num_samples.tolist() == [2]
    assert len(sketcher.sketched) == 2


def test_a_threshold_that_nothing_reaches_is_reported():
    (_, remark), _ = refresh([0, 0, 1, 1], [0, 0, 0, 0], best_reward=0.8)
    assert "largest reward seen is 0.8" in remark


def test_a_stage_that_fails_fails_the_refresh():
    refresher = Refresher(Recorder(), Ranks(torch.device("cpu")), 2, 4, 0)

    def fails():
        raise MemoryError("no room")

    with pytest.raises(FailedRefresh, match="MemoryError: no room"):
        refresher.run(fails, (), 0)
    with pytest.raises(FailedRefresh, match="no prompt has 2 samples with a verdict"):
        refresh([0, 1], [1, 0])


def test_the_user_can_stop_the_run():
    refresher = Refresher(Recorder(), Ranks(torch.device("cpu")), 2, 4, 0)

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresher.run(stopped, (), 0)
