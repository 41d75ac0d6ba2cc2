"""What importing the package brings along."""

import subprocess
import sys

import pytest

import passk_guard

HEAVY = """
import sys
{statement}
print(*sorted({{"torch", "transformers", "pydantic", "typer"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("statement", "brought"),
    [
        ("import passk_guard", ""),
        ("from passk_guard import GuardError, FailedRefresh", ""),
        ("import passk_guard.analysis, passk_guard.cli", "typer"),
        ("from passk_guard import estimate_conflict, pass_at_k, project_gradient, ScoreSketcher", "torch"),
    ],
)
def test_an_import_brings_only_what_it_needs(statement, brought):
    code = HEAVY.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == brought


def test_every_public_name_is_there():
    for name in passk_guard.__all__:
        assert getattr(passk_guard, name) is not None
    assert set(passk_guard.__all__) == set(passk_guard._MODULE_OF) == set(dir(passk_guard))


def test_the_function_analyze_is_not_hidden_by_a_module():
    import passk_guard.analysis.run

    assert passk_guard.analyze is passk_guard.analysis.analyze is passk_guard.analysis.run.analyze
