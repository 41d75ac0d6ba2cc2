"""The algebra of mitigation: project the gradient, solve the floor under the prompt weights, or combine by torchjd."""

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
