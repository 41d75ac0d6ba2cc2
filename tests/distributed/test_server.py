"""A vLLM server that fails on rank 0, where alone it is called: all ranks fail alike, and none waits."""

import pytest

from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


def test_no_rank_waits_for_a_server_that_failed_on_another(tmp_path):
    first, second = launch("server", tmp_path, 2, timeout=120, worker="tests.distributed.server_worker")
    assert first == second
    gone = ["rank 0: ConnectionError: the server is gone", -1]  # and the trainer sends its weights again
    assert first["generate"] == first["send"] == gone
    assert first["tokenize"] == ["rank 1: ZeroDivisionError: division by zero", -1]
    assert first["none"] == [True, True]
