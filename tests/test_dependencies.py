"""The house rule: the mathematics imports torch alone, siblings do not import each other, the callback only wires."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "passk_guard"

LEAVES = {
    "errors",
    "types",
    "patch",
    "dropout",
    "pixels",
    "journal_file",
    "timeouts",
    "once",
    "rollout_checks",
    "whole_file",
    "private_api",
    "telling",
    "own_file",
    "checkpoint_values",
}
MATHEMATICS = {
    "arguments",
    "gram_checks",
    "passk",
    "pkpo",
    "objectives",
    "population",
    "intervals",
    "ustatistics",
    "degenerate",
    "importance",
    "agreement",
    "estimator",
    "decision",
    "run_evidence",
    "noise",
    "power",
    "mitigation",
}
ROOMS = {
    "sketch",
    "probe",
    "sampling",
    "scoring",
    "isolation",
    "reporting",
    "objective",
    "config",
    "ranks",
    "progress",
    "engines",
    "pages",
}
WIRING = {
    "callback",
    "refresh",
    "sources",
    "assembly",
    "memory",
    "protect",
    "score_sums",
    "kept_rollouts",
    "step_guard",
    "protected_share",
    "floor_guard",
    "mitigator",
    "attachment",
    "compatibility",
    "token_budget",
    "analysis",
    "planning",
    "config_file",
    "cli",
    "__main__",
    "__init__",
}
STACK = {"transformers", "trl", "accelerate", "deepspeed", "pydantic", "datasets", "peft", "tqdm", "yaml", "numpy"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """Absolute names this file imports when it runs; what stands under TYPE_CHECKING is for the type checker."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def at_the_top(path):
    """First names of what is imported when the file is."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def own_rooms(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("passk_guard.")} - {room_of(path)}


def test_every_file_belongs_somewhere():
    assert {room_of(path) for path in modules()} == LEAVES | MATHEMATICS | ROOMS | WIRING


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    room, used = room_of(path), own_rooms(path)
    outside = {name.split(".")[0] for name in imports(path)}
    if room in LEAVES:
        assert used <= LEAVES
    elif room in MATHEMATICS:
        assert used <= LEAVES | MATHEMATICS
    elif room == "objective":
        assert used <= LEAVES | {"passk"}  # it is the closed form, put into a trainer
    elif room in ROOMS:
        assert used <= LEAVES, f"{path.name} imports a sibling: {used - LEAVES}"
    if room in LEAVES | MATHEMATICS | {"sketch", "ranks"}:
        assert not outside & STACK, f"{path.name} imports {outside & STACK}"
    assert not {"trl", "deepspeed", "peft"} & set(at_the_top(path)), "extras are imported where they are used"


def test_mathematics_imports_without_the_stack():
    blocked = ", ".join(repr(name) for name in sorted(STACK - {"numpy"}))
    script = f"""
import sys
for name in ({blocked}):
    sys.modules[name] = None
import torch
from passk_guard import estimate_conflict, passk_advantages, pass_at_k
score_sums = torch.randn(16, 5, dtype=torch.float64)
estimate = estimate_conflict(score_sums @ score_sums.T, torch.full((8,), 8), torch.arange(8), k=4)
assert estimate.status in ("clear", "conflict", "undetermined")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
