"""Masks of what the policy sampled: in the Gram matrix, the realised change, reuse, the protected direction."""

import dataclasses

import pytest
import torch

from passk_guard.mitigation.protected_direction import pass1_loss
from passk_guard.passk.closed_forms import sample_coefficients
from passk_guard.probe.passes import Scorer, SharedPrompts
from passk_guard.probe.records import Outcomes, Rollouts, check_rollouts
from passk_guard.probe.refresh import Refresher
from passk_guard.probe.rescoring import Rescorer, load_window, save_window
from passk_guard.probe.reuse import reweigh
from passk_guard.sketch import ScoreSketcher
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks
from tests.analysis.cases import PromptSampler, quick
from tests.helpers.tiny import tiny_model
from tests.sketch.oracle import log_prob

ALONE = Ranks(torch.device("cpu"))
PROMPTS = [[9, 10, 11, 12, 13, 14], [8, 9, 20], [21, 22, 23, 24]]


def trajectories(per_prompt=6):
    """A turn of the policy, a result of two tokens, and another turn, in each completion."""
    generator = torch.Generator().manual_seed(1)
    index = [x for x in range(3) for _ in range(per_prompt)]
    completions, masks = [], []
    for _ in index:
        first, second = torch.randint(1, 4, (2,), generator=generator).tolist()
        completions.append(torch.randint(6, 70, (first + 2 + second,), generator=generator).tolist())
        masks.append([1] * first + [0, 0] + [1] * second)
    size, verdicts = len(index), torch.tensor([1, 0, 1, 0, 0, 1] * 3, dtype=torch.int8)
    prompts = [PROMPTS[x] for x in index]
    rollouts = Rollouts([{}] * size, index, prompts, completions, [""] * size, 3, 0.7, masks)
    return rollouts, Outcomes(verdicts)


def each_log_prob(model, rollouts):
    found = []
    for prompt, ids, mask in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.policy_masks, strict=True):
        tokens = torch.tensor([*prompt, *ids])
        found.append(log_prob(model, tokens, torch.tensor([0] * len(prompt) + mask), 0.7))
    return torch.stack(found)


def score_sums(model, rollouts, outcomes, factors):
    """[6, P] S+ of the three prompts, then S-, by autograd over each sample."""
    sums = torch.zeros(6, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for i, (x, right) in enumerate(zip(rollouts.prompt_index, outcomes.correct.tolist(), strict=True)):
        model.zero_grad()
        (factors[i] * each_log_prob(model, rollouts)[i]).backward()
        sums[x if right else x + 3] += torch.cat([p.grad.flatten() for p in model.parameters()])
    return sums


def moved(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize("sharing", [True, False])
def test_the_realised_change_is_of_the_sampled_tokens(sharing, tmp_path):
    model, (rollouts, outcomes) = tiny_model(), trajectories()
    shared = SharedPrompts(Scorer(model, ALONE, 0)) if sharing else None
    scorer = Rescorer(model, ALONE, 60, 0, shared=shared)
    window = scorer.open(rollouts, outcomes, ("a", "b", "c"), 0)
    before = each_log_prob(model, rollouts).detach().double().view(3, 6)
    torch.testing.assert_close(window.log_probs, before, rtol=0, atol=1e-4)
    save_window(window, tmp_path / "window.pt")
    moved(model)
    expected = each_log_prob(model, rollouts).detach().double().view(3, 6) - before
    for again in (window, load_window(tmp_path / "window.pt", ALONE.device)):
        torch.testing.assert_close(scorer.log_ratios(again), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sharing", [True, False])
def test_the_gram_matrix_and_the_direction_are_of_the_sampled_tokens(sharing):
    model, (rollouts, outcomes) = tiny_model(), trajectories()
    shared = SharedPrompts(Scorer(model, ALONE, 0)) if sharing else None
    refresher = Refresher(ScoreSketcher(model, method="identity"), ALONE, 2, 60, 0, shared=shared)
    refresh = refresher.run(lambda: (rollouts, outcomes), (), 0)
    sums = score_sums(model, rollouts, outcomes, torch.ones(18))
    torch.testing.assert_close(refresh.probe.gram, sums @ sums.T, rtol=1e-4, atol=1e-3)
    positive, negative = sample_coefficients(torch.tensor(6), torch.tensor(3), 1)
    expected = -(float(positive) * sums[:3] + float(negative) * sums[3:]).mean(0).float()
    model.zero_grad()
    for batch in refresh.batches:
        pass1_loss(refresh, 1)(model, batch).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_kept_trajectories_are_reweighted_by_the_sampled_tokens():
    model, (rollouts, outcomes) = tiny_model(), trajectories()
    refresher = Refresher(ScoreSketcher(model, method="identity"), ALONE, 2, 60, 0, keeps_log_probs=True)
    sampled = refresher.run(lambda: (rollouts, outcomes), (), 0)
    before = each_log_prob(model, rollouts).detach()
    moved(model)
    again, _ = reweigh(sampled, refresher, 0, 0.01)
    ratios = (each_log_prob(model, rollouts).detach() - before).exp()
    sums = score_sums(model, rollouts, outcomes, ratios)
    torch.testing.assert_close(again.probe.gram, sums @ sums.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks[1:], "17 masks for 18 completions"),
        (lambda masks: [masks[0][1:], *masks[1:]], "sample 0 has . tokens and a mask of"),
        (lambda masks: [[2] * len(masks[0]), *masks[1:]], r"of \[2\]; expected 1 for each token"),
        (lambda masks: [[0] * len(mask) for mask in masks], "the policy sampled no token in any of 18 completions"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, message):
    rollouts, _ = trajectories()
    check_rollouts(rollouts, vocabulary=76, context=64)
    with pytest.raises(FailedRefresh, match=message):
        check_rollouts(
            dataclasses.replace(rollouts, policy_masks=change(rollouts.policy_masks)), vocabulary=76, context=64
        )


class MaskedSampler(PromptSampler):
    """Of each completion of two tokens the policy sampled the first."""

    def sample(self, rows, num_samples, seed):
        found = super().sample(rows, num_samples, seed)
        return dataclasses.replace(found, policy_masks=[[1, 0] for _ in found.completion_ids])


def test_an_analysis_keeps_masks_over_an_interruption(tmp_path):
    expected = quick(sampler=MaskedSampler())
    assert expected != quick(sampler=PromptSampler())
    with pytest.raises(KeyboardInterrupt):
        quick(sampler=MaskedSampler(stop_after=6), out=tmp_path)
    assert quick(sampler=MaskedSampler(), out=tmp_path) == expected
