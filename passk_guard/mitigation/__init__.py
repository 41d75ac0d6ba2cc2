"""The algebra of changing a gradient: what is added to it, or which floor lies under the weights it is made of."""

from passk_guard.mitigation.combine import combine
from passk_guard.mitigation.project import ProjectionResult, plan_projection, project_gradient, projection_coefficient
from passk_guard.mitigation.reweight import FloorSolution, FloorState, smooth_floor, solve_floor

__all__ = [
    "FloorSolution",
    "FloorState",
    "ProjectionResult",
    "combine",
    "plan_projection",
    "project_gradient",
    "projection_coefficient",
    "smooth_floor",
    "solve_floor",
]
