"""The one line that attaches a guard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passk_guard.callback.guard import PassKGuardCallback
from passk_guard.callback.setup import refuse_no_trainer
from passk_guard.config import GuardConfig
from passk_guard.probe.samplers import Sampler


def watch(
    trainer: Any,
    probe: Any = None,
    correct: Any = None,
    config: GuardConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    sampler: Sampler | None = None,
    **settings: Any,
) -> PassKGuardCallback:
    """Guard a trainer: `watch(trainer, probe=held_out, correct=accuracy, k=8)`, before `trainer.train()`.

    On the row of the loss, as `passk_guard/...`, and in `passk_guard.jsonl`; a number without evidence is absent:

    | name | meaning |
    |---|---|
    | `status` | 3 LOSING, 2 CONFLICT, 1 CLEAR, HOLDING or GAINING, 0 undetermined, -1 a failed refresh (row alone) |
    | `pass_at_1`, `pass_at_<k>`, each `_se` | pass rates of the probe now, with their standard errors |
    | `pass_at_1_change`, `pass_at_<k>_change`, each `_se` | what the updates since the last samples did |
    | `pass_at_1_total`, `pass_at_<k>_total`, each `_ci_low`, `_ci_high` | change since the start, with its interval |
    | `losing`, `losing_p_value` | whether LOSING stands; p of "pass@1 is not falling in this run" |
    | `effective_samples` | share of its samples that the last window was worth |
    | `cosine`, `cosine_ci_low`, `cosine_ci_high` | of grad J_k and grad J_1, over the pooled refreshes |
    | `objective_cosine`, each `_ci_low`, `_ci_high` | the same of what the run trains on, where that is neither |
    | `conflict`, `run_p_value` | whether CONFLICT stands; p of "no conflict in this run" |
    | `k_star` | largest k up to which no conflict is established |
    | `agreement` | E[w a] / E[w], the mean agreement score under the pass@k weights |
    | `frac_negative_pairs` | share of prompt pairs whose pass@1 gradients point against each other |
    | `weighted_prompts` | share of the prompts that count in the pass@k gradient |
    | `sampler_mismatch` | with vLLM: root mean square log ratio of a completion's probability to vLLM's, in nats |
    | `sampler_effective_samples` | with vLLM: share of its samples that the refresh is worth to the model |
    | `probe_seconds` | what the refresh took |
    | `probe_share` | work of the probe over that of training so far, in tokens (`overhead`) |

    Args:
        trainer, probe, correct, config, sampler, settings: as for `PassKGuardCallback`.

    Returns:
        The guard, which is among the trainer's callbacks now.

    Raises:
        GuardError: misuse, as `PassKGuardCallback`.
    """
    refuse_no_trainer(trainer)
    guard = PassKGuardCallback(trainer, probe, correct, config, sampler, **settings)
    trainer.add_callback(guard)
    return guard
