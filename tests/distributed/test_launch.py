"""The process that forks ranks says what went wrong in one of them, ends the others, and serves the next launch."""

import pytest

from tests.distributed.launch import start

pytestmark = pytest.mark.distributed
FAILING = {
    "assert 0": (60, "[1, 1]", "AssertionError"),
    "import os; time.sleep(60 * (os.environ['RANK'] == '0')); 1 / 0": (60, "[-6, 1]", "ZeroDivisionError"),
    "time.sleep(60)": (2, "[-6, -6]", "Fatal Python error: Aborted"),
}


def run(code, folder, timeout=60):
    start("timeit", ["-n1", "-r1", "-simport time", code], 2, folder, timeout)


@pytest.mark.parametrize("code", FAILING)
def test_how_ranks_end(code, tmp_path):
    timeout, ends, words = FAILING[code]
    with pytest.raises(AssertionError) as failed:
        run(code, tmp_path / "failed", timeout)
    assert f"the ranks ended with {ends}" in str(failed.value)
    assert words in str(failed.value)
    run("pass", tmp_path / "next")
