"""Does each fault have a test that fails without its handling? `python -m tests.mutations [WORDS OF A FAULT]`.

Works on copies of the tree, one mutation each, and prints a line for each.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations.table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SECONDS = 120
"""A test that hangs has caught its mutation."""


def mutate(mutation: Mutation, tree: Path) -> None:
    path = tree / "passk_guard" / mutation.file
    path.write_text(path.read_text().replace(mutation.old, mutation.new))


def verdict(mutation: Mutation) -> str:
    """What pytest says of the mutated copy."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("passk_guard", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        mutate(mutation, tree)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
        try:
            done = subprocess.run(
                command, cwd=tree, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return "caught (hangs)"
    return {0: "NOT CAUGHT", 1: "caught"}.get(done.returncode, f"pytest ended with {done.returncode}")


if __name__ == "__main__":
    chosen = [m for m in MUTATIONS if " ".join(sys.argv[1:]) in m.fault]
    found = []
    for mutation in chosen:
        found.append(verdict(mutation))
        print(f"| {mutation.fault} | {mutation.file} | `{mutation.test}` | {found[-1]} |", flush=True)
    sys.exit(any(not each.startswith("caught") for each in found))
