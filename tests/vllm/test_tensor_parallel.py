"""Two ranks that hold one vLLM between them."""

from tests.distributed.launch import launch
from tests.vllm.runs import served_model


def test_ranks_that_share_one_vllm_sample_the_same_tokens(tmp_path):
    """With seeds of their own they would run different batches, and the next collective would not match."""
    served_model(tmp_path / "model", num_key_value_heads=2)
    with_guard, without = (
        launch(name, tmp_path / name, 2, worker="tests.vllm.worker", anew=True) for name in ("guarded", "unguarded")
    )
    assert with_guard == [[without[0][0], 2]] * 2
    assert without[0] == without[1]
