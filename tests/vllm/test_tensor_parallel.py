"""Two ranks that hold one vLLM between them."""

from tests.distributed.launch import launch
from tests.vllm.runs import served_model


def test_ranks_that_share_one_vllm_sample_the_same_tokens(tmp_path):
    """With seeds of their own they would run different batches, and the next collective would not match."""
    served_model(tmp_path / "model", num_key_value_heads=2)
    ranks = launch("tensor_parallel", tmp_path, 2, worker="tests.vllm.worker")
    assert ranks[0] == ranks[1]
    weights, refreshes = ranks[0]["with"]
    assert weights == ranks[0]["without"][0]
    assert refreshes == 2
