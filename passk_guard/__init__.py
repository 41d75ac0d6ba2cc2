"""passk_guard: is this step buying pass@k with pass@1?

Every name is imported when it is first used. The mathematics (closed forms, estimates, decision, projection) needs
torch alone; the callback and `analyze` need the rest of the stack.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passk_guard.analysis import Analysis, analyze
    from passk_guard.analysis.compare import Comparison, compare
    from passk_guard.callback.guard import PassKGuardCallback
    from passk_guard.callback.watch import watch
    from passk_guard.change import ChangeEstimate, RunChange, cumulate, estimate_change
    from passk_guard.config import Advanced, GuardConfig
    from passk_guard.estimation.estimate import estimate_conflict, estimate_pooled
    from passk_guard.estimation.evidence import run_p_value
    from passk_guard.estimation.records import ConflictEstimate, ProbeGram
    from passk_guard.mitigation import HoldController, combine, project_gradient, smooth_floor, solve_floor
    from passk_guard.mitigation.objective import PassKObjective
    from passk_guard.passk import Weighting, named_weighting
    from passk_guard.passk.closed_forms import pass_at_k, passk_advantages, passk_weight, population_conflict
    from passk_guard.probe.prompts import ProbeSet
    from passk_guard.probe.samplers import GenerateSampler, Sampler, TRLSampler
    from passk_guard.probe.verifier import Verifier
    from passk_guard.reporting.run_report import RunReport, report
    from passk_guard.sketch import ScoreSketcher
    from passk_guard.utils.errors import FailedRefresh, GuardError

_PLACES = {
    "analysis": ("Analysis", "analyze"),
    "analysis.compare": ("Comparison", "compare"),
    "callback.guard": ("PassKGuardCallback",),
    "callback.watch": ("watch",),
    "change": ("ChangeEstimate", "RunChange", "cumulate", "estimate_change"),
    "config": ("Advanced", "GuardConfig"),
    "estimation.estimate": ("estimate_conflict", "estimate_pooled"),
    "estimation.evidence": ("run_p_value",),
    "estimation.records": ("ConflictEstimate", "ProbeGram"),
    "mitigation": ("HoldController", "combine", "project_gradient", "smooth_floor", "solve_floor"),
    "mitigation.objective": ("PassKObjective",),
    "passk": ("Weighting", "named_weighting"),
    "passk.closed_forms": ("pass_at_k", "passk_advantages", "passk_weight", "population_conflict"),
    "probe.prompts": ("ProbeSet",),
    "probe.samplers": ("GenerateSampler", "Sampler", "TRLSampler"),
    "probe.verifier": ("Verifier",),
    "reporting.run_report": ("RunReport", "report"),
    "sketch": ("ScoreSketcher",),
    "utils.errors": ("FailedRefresh", "GuardError"),
}
_MODULE_OF = {name: f"passk_guard.{place}" for place, names in _PLACES.items() for name in names}

__all__ = [
    "Advanced",
    "Analysis",
    "ChangeEstimate",
    "Comparison",
    "ConflictEstimate",
    "FailedRefresh",
    "GenerateSampler",
    "GuardConfig",
    "GuardError",
    "HoldController",
    "PassKGuardCallback",
    "PassKObjective",
    "ProbeGram",
    "ProbeSet",
    "RunChange",
    "RunReport",
    "Sampler",
    "ScoreSketcher",
    "TRLSampler",
    "Verifier",
    "Weighting",
    "analyze",
    "combine",
    "compare",
    "cumulate",
    "estimate_change",
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
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name == "__version__":
        return metadata.version("passk-guard")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
