"""Journals of made-up runs, with everything that a run can write, and of an earlier version."""

import math
from pathlib import Path

from passk_guard.reporting import Journal
from tests.helpers.hostile import HOSTILE

EARLIER = sorted((Path(__file__).parents[1] / "data" / "earlier").glob("*.jsonl"))  # written by an earlier version


def write_run(folder, *, guarded=False, refreshes=20, hostile=False, settings=None):
    """A run that falls into conflict at step 15, fails to refresh from 45 to 60, and, `guarded`, keeps its pass@1."""
    journal = Journal(folder / "passk_guard.jsonl")
    if settings is not None:
        journal.write("start", 0, settings=settings)
    verdict = "undetermined"
    for i in range(refreshes):
        step = 5 * i
        if guarded and i:
            journal.write("steps", step, **_guarded_steps(i))
        if 9 <= i < 13:
            reason = HOSTILE if hostile else "every reward call failed"
            journal.write("failed_refresh", step, reason=reason, streak=i - 8)
            continue
        was, verdict = verdict, _verdict(i)
        floor = {"floor": 0.3 + 0.01 * i} if guarded else {}
        journal.write("refresh", step, **_refresh(i, guarded, verdict), **floor)
        if was != verdict:
            message = HOSTILE if hostile else f"passk_guard step {step}: {verdict.upper()}"
            journal.write("state", step, **{"from": was, "to": verdict}, message=message)
    return folder


def _verdict(i):
    if i < 3:
        return "undetermined"
    return "conflict" if i < 16 else "clear"


def _refresh(i, guarded, verdict):
    known = i not in (0, 6)
    cosine = -0.6 + 0.04 * i if i < 16 else 0.3
    return {
        "status": verdict,
        "verdict": verdict,
        "reason": "the upper bound is below the threshold" if known else "the probe holds no pass@8 signal",
        "confidence": 0.95,
        "refreshes": min(i + 1, 3),
        "prompts": 64,
        "informative": 40 + i,
        "held_out": True,
        "remark": None,
        "cosine": cosine if known else None,
        "cosine_ci_low": cosine - 0.25 if known else None,
        "cosine_ci_high": cosine + 0.2 if known else None,
        "pass_at_1": (0.6 + 0.005 * math.sin(i)) if guarded else 0.6 - 0.008 * i,
        "pass_at_1_se": 0.03,
        "pass_at_8": 0.8 + (0.005 if guarded else 0.007) * i,
        "pass_at_8_se": 0.02,
        "k_star": 2 if known else None,
        "agreement": -0.3 if known else None,
        "frac_negative_pairs": 0.4 + 0.005 * i,
        "conflict": {"conflict": 1.0, "clear": 0.0}.get(verdict),
        "probe_seconds": 1.5,
    }


def _guarded_steps(i):
    return {
        "train_cosine": -0.2 + 0.03 * i,
        "mitigated": 1.0 if i < 16 else 0.2,
        "coefficient": 0.5 - 0.02 * i,
        "grad_norm_before": 2.0,
        "grad_norm_after": 2.1,
        "mitigation_seconds": 0.002,
    }
