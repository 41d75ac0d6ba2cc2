"""The whole pipeline on a model with skill, against exact gradients: sampling, scoring, sketching, estimating."""

import math
from pathlib import Path

import pytest
import torch

from examples.interference.exact import pass_at_k, success_probability
from examples.interference.task import correct, make_prompts
from examples.interference.train import build_trainer
from examples.interference.warm_start import warm_start
from passk_guard import ScoreSketcher
from passk_guard.estimation.ustatistics import passk_rows, pooled_moments
from passk_guard.probe.prompts import HeldOut, ProbeSet
from passk_guard.probe.refresh import Refresher
from passk_guard.probe.samplers import TRLSampler
from passk_guard.probe.verifier import Verifier
from passk_guard.utils.ranks import Ranks

CACHE = Path(__file__).parents[2] / "runs" / "warm_start"
K, PROMPTS, SAMPLES, REFRESHES = 8, 64, 16, 40


def exact_moments(model, tokenizer, rows):
    """(<grad J_k, grad J_1>, |grad J_1|^2, |grad J_k|^2) over all of `rows`, by autograd."""
    p = success_probability(model, tokenizer, rows)
    parameters = list(model.parameters())
    g1, gk = (
        torch.cat([g.flatten() for g in torch.autograd.grad(pass_at_k(p, j), parameters, retain_graph=True)]).double()
        for j in (1, K)
    )
    return torch.stack([gk @ g1, g1 @ g1, gk @ gk])


@pytest.mark.slow
def test_the_pipeline_is_unbiased_for_exact_gradients(tmp_path):
    trainer = build_trainer(warm_start(CACHE, 0), tmp_path, steps=1, report_to=[])
    trainer.model.eval()
    rows = make_prompts("probe", 2048, seed=0)
    exact = exact_moments(trainer.model, trainer.processing_class, rows)
    source = HeldOut(ProbeSet.of(rows), TRLSampler(trainer), PROMPTS, SAMPLES, seed=0)
    refresher = Refresher(ScoreSketcher(trainer.model), Ranks(torch.device("cpu")), K, 16384, 0)
    verifier = Verifier(correct)
    probes = []
    for refresh in range(REFRESHES):
        rollouts = source.rollouts(refresh, 0, 1)
        outcomes = verifier.score(rollouts)
        done = refresher.run(lambda r=rollouts, o=outcomes: (r, o), source.keys(refresh), seed=refresh)
        assert done.remark is None
        probes.append(done.probe)
    values = torch.stack([pooled_moments([probe], passk_rows(torch.tensor([K]))).value[0] for probe in probes])
    mean, error = values.mean(0), values.std(0) / math.sqrt(REFRESHES)
    print("exact", exact.tolist(), "mean", mean.tolist(), "error", error.tolist())
    assert bool(((mean - exact).abs() < 3.5 * error).all())
    assert bool((error < 0.5 * exact.abs()).all()), "the comparison must be sharp enough to mean something"
