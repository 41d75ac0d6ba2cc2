"""Faults on one of two ranks: no rank waits, all decide the same, and training is bit for bit that without a guard."""

import pytest
import torch

from tests.distributed.fault_worker import FAULTS
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed
REASONS = {
    "verifier_raises": "rank 1: `raises` raised on each of",
    "verifier_hangs": "was still running after 1 s",
    "generation_raises": "rank 1: ConnectionError: the server is gone",
    "logits_are_nan": "rank 1: ",
    "sketch_raises": "rank 1: ArithmeticError",
    "estimate_raises": "rank 1: ArithmeticError",
    "moving_the_multiplier_raises": "rank 1: ZeroDivisionError",
    "the_end_of_a_refresh_raises": "it failed on another rank",
}
LOGGED = {
    "no_report_gets_out": ["takes no more events, metrics go to the log only: [Errno 28]", "trackio did not take the"],
    "checkpoint_on_a_full_disk": ["the checkpoint holds no memory of the guard: RuntimeError: PytorchStreamWriter"],
    "opening_a_window_raises": ["no window of the realised change begins here: rank 1: ArithmeticError"],
    "gradient_is_infinite_in_training": ["steps stay unchanged where"],
}
WINDOWS = {
    "closing_a_window_raises": ["rank 1: ArithmeticError: not foreseen"],
    "a_layer_raises_as_a_window_closes": ["rank 1: ArithmeticError: not foreseen"],
    "opening_a_window_raises": [],
    "rank_without_data": [None],
}
CASES = [(engine, name) for name, (_, engines, _) in FAULTS.items() for engine in engines]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """By engine, what each of two ranks found in all runs that the selected tests look at."""
    found, selected = {}, [item for item in request.session.items if item.module is request.module]
    alone = all(item.function is test_a_fault for item in selected)
    names = [item.callspec.params["name"] for item in selected] if alone else []

    def of(engine):
        if engine not in found:
            folder = tmp_path_factory.mktemp(engine)
            scenario = f"{engine}:{','.join(dict.fromkeys(names))}"
            found[engine] = launch(scenario, folder, 2, timeout=900, worker="tests.distributed.fault_worker")
        return found[engine]

    return of


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_a_fault(engine, name, outcomes):
    ranks = [rank[name] for rank in outcomes(engine)]
    for rank in ranks:
        assert rank["same"] == dict.fromkeys(("weights", "losses", "steps"), True)
        assert rank["seconds"] < 200
        for what in ("failures", "refreshes", "windows", "change"):
            assert rank[what] == ranks[0][what], "all decide the same"
        if rank["gives_up"]:
            assert rank["failures"] == 2
            assert rank["mitigated"] == []
        else:
            assert rank["failures"] == 0
            assert rank["refreshes"] >= 1
            assert not any(rank["mitigated"])
    if name == "probe_smaller_than_a_refresh":
        assert [len(rank["gram"]) for rank in ranks] == [6, 6], "each of the three prompts once"
    if name in REASONS:
        assert REASONS[name] in ranks[0]["reasons"][0]
    if name in WINDOWS:
        found = [window["remark"] for window in ranks[0]["windows"]]
        assert found == WINDOWS[name]
        assert ranks[0]["change"]["sums"]["missed"] == len([remark for remark in found if remark])
    for words in LOGGED.get(name, ()):
        assert words in "\n".join(ranks[0]["logged"])


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_less_memory_on_one_rank_is_less_on_all(engine, outcomes):
    first, second = (rank["memory_for_half_a_batch"] for rank in outcomes(engine))
    assert len(first["passes"]) == len(second["passes"]), "ranks that share weights make equally many passes"
    assert max(second["passes"]) <= 100
    smaller = [i for i, tokens in enumerate(first["passes"]) if tokens > 100]
    assert smaller == [0, 1], "tried twice, and never again in the second refresh"
    assert first["gram"] == second["gram"]
    if engine == "ddp":
        whole = torch.tensor(outcomes(engine)[0]["checkpoint_on_a_full_disk"]["gram"])
        found = torch.tensor(first["gram"])
        assert float(whole.abs().max()) > 0
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
