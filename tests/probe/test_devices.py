"""Log ratios of a model that rounds, on the device at hand, against float32 on the CPU."""

from copy import deepcopy

import pytest
import torch

from passk_guard.probe.rescoring import Rescorer
from passk_guard.utils.ranks import Ranks
from tests.helpers.devices import DEVICES
from tests.helpers.tiny import tiny_model
from tests.probe.test_rescoring import KEYS, one_at_a_time, sampled


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_log_ratios_in_bf16_err_by_the_noise_that_is_measured(attention, device, record_property):
    """The noise that the window measured by itself is what the ratios are off by; without a change they are 0."""
    rollouts, outcomes = sampled(60)
    model = tiny_model(attn_implementation=attention).to(device, torch.bfloat16)
    scorer = Rescorer(model, Ranks(torch.device(device)), 1000, 0, precision=torch.bfloat16)
    exact = lambda: one_at_a_time(deepcopy(model).cpu().float(), rollouts)  # noqa: E731
    window, before = scorer.open(rollouts, outcomes, KEYS, 0), exact()
    assert torch.equal(scorer.log_ratios(window), torch.zeros(3, 60, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    error = scorer.log_ratios(window) - (exact() - before)
    rms = float(error.square().mean().sqrt())
    record_property("noise_measured", window.noise)
    record_property("noise_found", rms)
    assert window.noise == pytest.approx(rms, rel=0.3)
