"""The table of mutations does not rot: what each takes away stands once in the sources; its test and its line exist."""

import ast

import pytest

from tests.mutations.__main__ import ROOT, line
from tests.mutations.table import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_mutation_applies(mutation):
    assert (ROOT / "passk_guard" / mutation.file).read_text().count(mutation.old) == 1
    path, _, name = mutation.test.partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    assert name.split("[")[0] in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert line(mutation) in (ROOT / "docs" / "faults.md").read_text()
