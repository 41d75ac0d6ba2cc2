"""passk_guard: is this step buying pass@k with pass@1?

The mathematics (closed forms, estimates, decision, projection) needs torch alone and imports without the rest of the
stack; the callback and its parts are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from passk_guard.estimation.estimate import estimate_conflict, estimate_pooled
from passk_guard.estimation.evidence import run_p_value
from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.mitigation import combine, project_gradient, smooth_floor, solve_floor
from passk_guard.passk import Weighting, named_weighting
from passk_guard.passk.closed_forms import pass_at_k, passk_advantages, passk_weight
from passk_guard.passk.population import population_conflict
from passk_guard.utils.errors import FailedRefresh, GuardError

if TYPE_CHECKING:
    from passk_guard.analysis import Analysis, analyze
    from passk_guard.callback.guard import PassKGuardCallback
    from passk_guard.config import Advanced, GuardConfig
    from passk_guard.mitigation.objective import PassKObjective
    from passk_guard.probe.prompts import ProbeSet
    from passk_guard.probe.samplers import GenerateSampler, Sampler, TRLSampler
    from passk_guard.probe.verifier import Verifier
    from passk_guard.reporting.run_report import RunReport, report
    from passk_guard.sketch import ScoreSketcher

_LAZY = {
    "Analysis": "passk_guard.analysis",
    "GenerateSampler": "passk_guard.probe.samplers",
    "Advanced": "passk_guard.config",
    "GuardConfig": "passk_guard.config",
    "PassKGuardCallback": "passk_guard.callback.guard",
    "PassKObjective": "passk_guard.mitigation.objective",
    "ProbeSet": "passk_guard.probe.prompts",
    "RunReport": "passk_guard.reporting.run_report",
    "Sampler": "passk_guard.probe.samplers",
    "ScoreSketcher": "passk_guard.sketch",
    "TRLSampler": "passk_guard.probe.samplers",
    "Verifier": "passk_guard.probe.verifier",
    "analyze": "passk_guard.analysis",
    "report": "passk_guard.reporting.run_report",
}

__all__ = [
    "Advanced",
    "Analysis",
    "ConflictEstimate",
    "FailedRefresh",
    "GenerateSampler",
    "GuardConfig",
    "GuardError",
    "PassKGuardCallback",
    "PassKObjective",
    "ProbeGram",
    "ProbeSet",
    "RunReport",
    "Sampler",
    "ScoreSketcher",
    "TRLSampler",
    "Verifier",
    "Weighting",
    "analyze",
    "combine",
    "estimate_conflict",
    "estimate_pooled",
    "named_weighting",
    "pass_at_k",
    "passk_advantages",
    "passk_weight",
    "population_conflict",
    "project_gradient",
    "report",
    "run_p_value",
    "smooth_floor",
    "solve_floor",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
