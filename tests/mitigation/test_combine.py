"""Weights from torchjd, against what each method promises about two gradients."""

import sys

import pytest
import torch

from passk_guard.mitigation import combine, projection_coefficient
from passk_guard.mitigation.combine import METHODS
from passk_guard.utils.errors import FailedRefresh, GuardError

G, P = torch.tensor([3.0, 0.0, 1.0]).double(), torch.tensor([-1.0, 0.5, 0.0]).double()


def gramian(g=G, p=P):
    vectors = torch.stack([g, p])
    return vectors @ vectors.T


@pytest.fixture
def aggregation():
    return pytest.importorskip("torchjd.aggregation")


def combined(method, g=G, p=P):
    w = combine(gramian(g, p), method)
    return w[0] * g + w[1] * p


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_torchjds(name, aggregation):
    expected = getattr(aggregation, METHODS[name])()(gramian())
    assert torch.allclose(combine(gramian(), name), expected, rtol=1e-6)
    assert torch.equal(combine(gramian(), name.upper().replace("-", "_")), combine(gramian(), name))


def test_each_method_keeps_its_promise(aggregation):
    candidates = [w * G + (1 - w) * P for w in torch.linspace(0, 1, 10001).double()]
    assert combined("mgda").norm() == pytest.approx(min(float(c.norm()) for c in candidates), rel=1e-3)
    d = combined("imtl-g")
    assert d @ G / G.norm() == pytest.approx(float(d @ P / P.norm()), rel=1e-9)
    assert combined("aligned-mtl") @ G > 0
    assert combined("aligned-mtl") @ P > 0
    assert combined("pcd") @ P > 0


def test_pcd_and_project_take_the_same_direction(aggregation):
    ours = G + projection_coefficient(float(G @ P), float(G @ G), float(P @ P), 0.2) * P
    theirs = combined(aggregation.PCDWeighting(tau=0.2))
    assert torch.allclose(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-6)
    assert theirs.norm() == pytest.approx(float(G.norm()), rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [1e-10, 1e15])
def test_a_common_scale_changes_no_weight(name, scale, aggregation):
    expected = combine(gramian(), name)
    assert torch.allclose(combine(gramian(scale * G, scale * P), name), expected, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_random_generators_are_left_alone(name, aggregation):
    before = torch.get_rng_state()
    combine(gramian(), name)
    assert torch.equal(before, torch.get_rng_state())


def test_a_weighting_of_ones_own_keeps_its_memory(aggregation):
    own = aggregation.PCDWeighting()
    first, second = combine(gramian(), own), combine(gramian(10 * G), own)
    assert not torch.allclose(second, combine(gramian(10 * G), "pcd"), rtol=1e-3)
    assert torch.allclose(first, combine(gramian(), "pcd"), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_matrix_without_an_answer_voids(bad):
    matrix = gramian()
    matrix[1, 1] = bad
    with pytest.raises(FailedRefresh, match="Gram matrix"):
        combine(matrix, "mgda")


def test_weights_that_are_not_finite_void():
    with pytest.raises(FailedRefresh, match="gave the weights"):
        combine(gramian(), lambda matrix: matrix[0] * float("nan"))


def test_misuse_is_refused(monkeypatch):
    with pytest.raises(GuardError, match=r"\[2, 2\]"):
        combine(torch.eye(3), "mgda")
    with pytest.raises(GuardError, match="one of mgda"):
        combine(gramian(), "upgrad")
    with pytest.raises(GuardError, match="project_gradient"):
        combine(gramian(), "PCGrad")
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(GuardError, match="pip install torchjd"):
        combine(gramian(), "mgda")
