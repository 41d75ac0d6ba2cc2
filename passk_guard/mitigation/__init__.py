"""The algebra of changing a gradient: what is added to it, or which floor lies under the weights it is made of."""

from passk_guard.mitigation.combine import combine
from passk_guard.mitigation.floor import FloorSolution, FloorState, smooth_floor, solve_floor
from passk_guard.mitigation.projection import (
    ProjectionResult,
    plan_projection,
    project_gradient,
    projection_coefficient,
)

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
