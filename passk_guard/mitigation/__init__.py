"""The algebra of changing a gradient: what is added to it, from three inner products."""

from passk_guard.mitigation.combine import combine
from passk_guard.mitigation.project import ProjectionResult, plan_projection, project_gradient, projection_coefficient

__all__ = ["ProjectionResult", "combine", "plan_projection", "project_gradient", "projection_coefficient"]
