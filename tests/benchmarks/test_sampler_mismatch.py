"""What unweighed samples of another policy give on average, by sums over all outcomes."""

import torch

from benchmarks import sampler_mismatch
from passk_guard.passk.closed_forms import passk_weight


def test_expected_gradients():
    generator = torch.Generator().manual_seed(0)
    pi, mu = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64).log_softmax(-1)
    raw = torch.randn(5, 12, 7, generator=generator, dtype=torch.float64)
    scores = raw - (pi.exp()[..., None] * raw).sum(1, keepdim=True)  # E_pi[s] = 0
    right = torch.arange(12) % 3 == 0

    p, slope = (pi.exp() * right).sum(1), torch.einsum("xv,xvd->xd", pi.exp() * right, scores)
    exact = torch.stack([passk_weight(p, k)[:, None] * slope for k in (1, sampler_mismatch.K)])
    torch.testing.assert_close(sampler_mismatch._expected_gradients(pi, scores, right), exact)

    q, mean = (mu.exp() * right).sum(1), torch.einsum("xv,xvd->xd", mu.exp(), scores)
    covariance = torch.einsum("xv,xvd->xd", mu.exp() * right, scores) - q[:, None] * mean  # of r and s under mu
    torch.testing.assert_close(sampler_mismatch._expected_gradients(mu, scores, right)[0], covariance)
