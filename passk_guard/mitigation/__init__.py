"""The algebra of mitigation: hold pass@1, project the gradient, solve the floor under the weights, or combine."""

from passk_guard.mitigation.combine import combine
from passk_guard.mitigation.floor import FloorSolution, FloorState, smooth_floor, solve_floor
from passk_guard.mitigation.hold import HoldController, HoldMeasurement, HoldState, first_multiplier
from passk_guard.mitigation.projection import (
    ProjectionResult,
    plan_held,
    plan_projection,
    project_gradient,
    projection_coefficient,
)

__all__ = [
    "FloorSolution",
    "FloorState",
    "HoldController",
    "HoldMeasurement",
    "HoldState",
    "ProjectionResult",
    "combine",
    "first_multiplier",
    "plan_held",
    "plan_projection",
    "project_gradient",
    "projection_coefficient",
    "smooth_floor",
    "solve_floor",
]
