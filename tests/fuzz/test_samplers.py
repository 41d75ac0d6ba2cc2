"""What a user's own sampler returns: rollouts that a model can read, or a failed refresh in words."""

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.probe.records import Rollouts, check_rollouts
from passk_guard.sketch import token_batches
from passk_guard.utils.errors import FailedRefresh
from tests.fuzz.strategies import NUMBER, SCALAR

TOKEN = st.one_of(st.integers(0, 9), NUMBER, SCALAR, st.just(np.int64(3)), st.just(torch.tensor(4)))
ARRAYS = [torch.tensor([1, 2]), torch.tensor([1.5]), np.array([1, 2]), np.zeros((2, 2)), "ab"]
IDS = st.one_of(st.lists(st.integers(0, 9), max_size=4), st.lists(TOKEN, max_size=4), st.sampled_from(ARRAYS))
LISTS = st.one_of(st.lists(IDS, min_size=2, max_size=2), st.lists(IDS, max_size=3))


@given(LISTS, LISTS, st.lists(SCALAR, max_size=3), st.sampled_from([None, 0, 10]), st.sampled_from([None, 0, 5]))
@example([[1], [2]], [[3], [4.0]], ["a", "b"], 10, None)
@example([[1], [2]], [[3], [True]], ["a", "b"], 10, None)
@example([[1], [2]], [[], []], ["a", "b"], None, None)
@example([[1], [2]], [[10], [1]], ["a", "b"], 10, None)
def test_any_rollouts(prompt_ids, completion_ids, completions, vocabulary, context):
    rollouts = Rollouts([{"prompt": "p"}] * 2, [0, 1], prompt_ids, completion_ids, completions, 2)
    try:
        check_rollouts(rollouts, vocabulary=vocabulary, context=context)
    except FailedRefresh:
        return
    assert len(prompt_ids) == len(completion_ids) == len(completions) == 2
    assert any(len(ids) for ids in completion_ids)
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        ids = [*map(int, prompt), *map(int, completion)]
        assert context is None or len(ids) <= context
        assert min(ids, default=0) >= 0
        assert vocabulary is None or max(ids, default=0) < 10
    if vocabulary is not None:
        cpu = torch.device("cpu")
        batches = list(token_batches(prompt_ids, completion_ids, [0, 1], max_tokens=64, pad_token_id=0, device=cpu))
        assert sum(int(batch.completion_mask.sum()) for batch in batches) <= sum(map(len, completion_ids))
