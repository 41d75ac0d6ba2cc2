"""Does each fault have a test that fails without its handling? `python -m tests.mutations [WORDS OF A FAULT, ...]`.

Runs the tests once as the tree is, then on copies with one mutation each, and prints a line for each. Words that are
separated by commas choose more than one fault.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations.mutation import Mutation
from tests.mutations.table import MUTATIONS

ROOT = Path(__file__).parents[2]
SECONDS = 180
"""What no test takes by itself: one that hangs has caught its mutation."""


def mutate(mutation: Mutation, tree: Path) -> None:
    path = tree / "passk_guard" / mutation.file
    path.write_text(path.read_text().replace(mutation.old, mutation.new))


def pytest(tree: Path, tests: list[str], seconds: float | None) -> int | None:
    """What pytest ends with on a tree; None where it had to be stopped."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    environment, quiet = os.environ | {"PYTHONPATH": str(tree)}, subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=quiet, stderr=quiet, start_new_session=True
    ) as child:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)  # a launcher among them takes its ranks with it
            return None


def verdict(mutation: Mutation) -> str:
    """What pytest says of the mutated copy."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree = Path(folder)
        for part in ("passk_guard", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        mutate(mutation, tree)
        code = pytest(tree, [mutation.test], SECONDS)
    return {None: "hangs: caught", 0: "NOT CAUGHT", 1: "caught"}.get(code, f"pytest ended with {code}")


def line(mutation: Mutation) -> str:
    """The fault's line of docs/faults.md, but for the verdict."""
    return f"| {mutation.fault} | {mutation.effect} | `{mutation.file}` | `{mutation.test}` |"


if __name__ == "__main__":
    words = [each.strip() for each in " ".join(sys.argv[1:]).split(",")]
    chosen = [m for m in MUTATIONS if any(each in m.fault for each in words)]
    if pytest(ROOT, list(dict.fromkeys(m.test for m in chosen)), None) != 0:
        sys.exit("The tests must pass on the tree as it is; found one that does not.")
    found = []
    for mutation in chosen:
        found.append(verdict(mutation))
        print(line(mutation), found[-1], "|", flush=True)
    sys.exit(any("caught" not in each for each in found))
