"""DeepSpeed engines: a guarded run equals one process of plain PyTorch, and a probe leaves no trace."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from passk_guard.mitigation.engines.deepspeed.choose import deepspeed_engine
from passk_guard.mitigation.engines.deepspeed.restore import Lent
from passk_guard.utils.errors import GuardError
from tests.mitigation.engines import neutral, oracle
from tests.mitigation.engines.deepspeed_cases import CASES, EXACT, HARD, OVERFLOWING, ROUNDED, STAGES, UNEVEN

ROOT = Path(__file__).parents[3]
DEFAULT = "exact,replaced,failed,misused,own_loop"
"""Scenarios of one launch."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each rank returned for some scenarios: one launch for all the tests that ask for the same."""
    pytest.importorskip("deepspeed")

    @cache
    def results(scenarios, ranks=2):
        folder = tmp_path_factory.mktemp("deepspeed")
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "tests.mitigation.engines.deepspeed_worker", scenarios, str(folder)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]

    def of_case(scenario, name, launch=None, ranks=2):
        """Results of one case by rank."""
        found = [rank[scenario][name] for rank in results(launch or scenario, ranks)]
        for result in found:
            assert "error" not in result, result["error"]
        return found

    return of_case


@cache
def reference(recipe):
    """Final weights by name, and the history, of one process."""
    model, history = oracle.train(recipe)
    return oracle.weights(model), history


@cache
def beginning(recipe):
    return oracle.weights(oracle.build_model(recipe))


def recipe_of(name, ranks, **changes):
    return oracle.Recipe(**({"ranks": ranks} | CASES[name][0] | changes))


def error_of(weights, recipe):
    return oracle.relative_error(weights, reference(recipe)[0], beginning(recipe))


def check_run(ranks, name, tolerance):
    recipe = recipe_of(name, len(ranks))
    expected = reference(recipe)[1]
    first = ranks[0]
    assert error_of(first["weights"], recipe) < tolerance
    assert error_of(first["plain"], recipe) > 0.1  # the edit matters
    assert len({rank["digest"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["probe_leaves_no_trace"]
        assert rank["history"] == first["history"]  # all ranks took the same decisions
        assert len(rank["history"]) == recipe.steps
        check_history(rank["history"], expected, 10 * tolerance)


def check_history(history, expected, tolerance):
    """Inner products of the gradient and the probe gradient: unlike the edit they show a scaled probe gradient."""
    for found, wanted in zip(history, expected, strict=True):
        scale = (wanted["gg"] * wanted["pp"]) ** 0.5
        assert abs(found["gp"] - wanted["gp"]) < tolerance * scale
        assert found["gg"] == pytest.approx(wanted["gg"], rel=tolerance)
        assert found["pp"] == pytest.approx(wanted["pp"], rel=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("name", EXACT)
def test_a_guarded_run_equals_one_process(launched, name):
    check_run(launched("exact", name, DEFAULT), name, 1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", HARD)
def test_so_it_does_under_every_other_setting(launched, name):
    check_run(launched("hard", name), name, 1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", UNEVEN)
def test_so_it_does_where_no_size_divides_by_the_ranks(launched, name):
    check_run(launched("uneven", name, ranks=3), name, 1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ROUNDED)
def test_in_half_precision_the_guard_adds_no_error_of_its_own(launched, name):
    ranks = launched("rounded", name)
    recipe = recipe_of(name, len(ranks))
    unguarded = oracle.Recipe(**{**vars(recipe), "gamma": None})
    noise = error_of(ranks[0]["plain"], unguarded)
    assert error_of(ranks[0]["weights"], recipe) < max(1.3 * noise, 1e-3)
    assert noise < 0.1
    assert all(rank["probe_leaves_no_trace"] for rank in ranks)
    assert len({rank["digest"] for rank in ranks}) == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", OVERFLOWING)
def test_overflowing_steps_and_the_loss_scale_stay_as_they_were(launched, name):
    for rank in launched("overflow", name, "rounded,overflow"):
        assert rank["guarded"] == rank["plain"]
        assert 0 < rank["plain"][1] < 8  # some steps were skipped


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_the_optimizer_gets_the_probe_gradient_of_one_process(launched, name):
    first = launched("replaced", name, DEFAULT)[0]
    recipe = recipe_of(name, 2, **first["changes"])
    expected = oracle.full_probe_gradient(oracle.build_model(recipe), recipe)
    start = beginning(recipe)
    step = {key: start[key] - value for key, value in first["weights"].items()}  # the learning rate of SGD is 1
    tolerance = 8e-2 if "bf16" in name else 2e-6
    zeros = {key: torch.zeros_like(value) for key, value in expected.items()}
    assert oracle.relative_error(step, expected, zeros) < tolerance
    norm = float(oracle.flat(expected.values()) @ oracle.flat(expected.values()))
    assert first["norm"] == pytest.approx(norm, rel=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_a_probe_that_fails_leaves_no_trace_either(launched, name):
    ranks = launched("failed", name, DEFAULT)
    for index, rank in enumerate(ranks):
        last = "Boom" if index == len(ranks) - 1 else "FailedRefresh"
        ways = ["before", "after", "forward", "backward", "shape", "one_rank"]
        kinds = ["Boom", "Boom", "Boom", "Boom", "GuardError", last]
        assert rank["raised"] == list(zip(ways, kinds, strict=True)) * 3
        assert rank["changed"] == []
        assert rank["same"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_misuse_is_refused_and_remove_leaves_nothing(launched, name):
    for rank in launched("misused", name, DEFAULT):
        step = ["uneven", "none", "outside", "add outside", "window", "inside"]
        assert [what for what, _ in rank["refused"]] == ["twice"] + step * 3
        assert all("found" in text or "asked for" in text or "already" in text for _, text in rank["refused"])
        assert rank["left"] == set()
        assert rank["same"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [n for n in STAGES if "bf16" not in n])
def test_a_loop_that_steps_on_every_micro_batch_is_edited_once_a_step(launched, name):
    ranks = launched("own_loop", name, DEFAULT)
    assert error_of(ranks[0]["weights"], recipe_of(name, 2)) < 1e-6
    for rank in ranks:
        check_history(rank["history"], reference(recipe_of(name, 2))[1], 1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_in_grpo_the_edit_reaches_the_optimizer(launched, name):
    for rank in launched("grpo", name):
        assert rank["nothing"] == rank["plain"] != rank["start"]
        assert rank["pushed"] != rank["plain"]
        assert min(rank["norms"]) > 0.0
        assert rank["erased"] == rank["start"]


def optimizer(kind="DeepSpeedZeroOptimizer", **attributes):
    """A stand-in of DeepSpeed's class of this name."""
    inner = type(attributes.pop("inner", "AdamW"), (), {})()
    return type(kind, (), {"optimizer": inner, "cpu_offload": False} | attributes)()


def engine(**attributes):
    names = ("step", "backward", "set_gradient_accumulation_boundary", "is_gradient_accumulation_boundary")
    methods = {name: lambda *args, **kwargs: True for name in names}
    fields = {"optimizer": optimizer(), "module": torch.nn.Linear(1, 1), "device": torch.device("cpu")}
    return SimpleNamespace(**(neutral.ENGINE | methods | fields | attributes))


def choose(found):
    wrapped = None if found is None else SimpleNamespace(engine=found)
    return deepspeed_engine(SimpleNamespace(accelerator=SimpleNamespace(deepspeed_engine_wrapped=wrapped)))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "on_train_begin"),
        (engine(pipeline_parallelism=True), "pipeline parallelism"),
        (engine(mpu=object()), "tensor or sequence parallelism"),
        (engine(autotp_size=lambda: 2), "autotp_size"),
        (engine(optimizer=optimizer(sequence_parallel_size=2)), "sequence parallelism"),
        (engine(has_moe_layers=True), "mixture of experts"),
        (engine(zero_hpz_partition_size=lambda: 8), "zero_hpz_partition_size=8"),
        (engine(zero_quantized_weights=lambda: True), "zero_quantized_weights"),
        (engine(zero_quantized_gradients=lambda: True), "zero_quantized_gradients"),
        (engine(zero_offload_optimizer=lambda: SimpleNamespace(device="nvme")), "NVMe offload"),
        (engine(zero_offload_param=lambda: SimpleNamespace(device=SimpleNamespace(value="nvme"))), "offload_param"),
        (engine(zero_partial_offload=lambda: 0.5), "partial optimizer offload"),
        (engine(zenflow=True), "ZenFlow"),
        (engine(is_deepcompile_enabled=lambda: True), "DeepCompile"),
        (engine(managed_gradient_accumulation=lambda: False), "managed_gradient_accumulation"),
        (engine(gradient_average=False), "summed over ranks"),
        (engine(enable_backward_allreduce=False), "communicates by itself"),
        (engine(optimizer=optimizer(inner="MuonWithAuxAdam")), "Muon"),
        (engine(optimizer=optimizer(master_weights_and_grads_dtype=torch.bfloat16)), "master weights"),
        (engine(optimizer=optimizer(torch_autocast_gradscaler=object())), "torch autocast"),
        (engine(torch_autocast_z0_gradscaler=object()), "torch autocast"),
        (engine(optimizer=optimizer("FP16_UnfusedOptimizer")), "ZeRO-0 in half precision"),
        (engine(optimizer=optimizer("FP16_Optimizer")), "ZeRO-0 in half precision"),
        (engine(optimizer=optimizer("MiCS_Optimizer")), "found MiCS_Optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_never_measured_is_refused(found, message):
    with pytest.raises(GuardError, match=message) as refusal:
        choose(found)
    if found is not None:
        assert "0.19.8" in str(refusal.value)


def test_lent_buffers_come_back_and_the_result_is_kept():
    buffers = [torch.arange(5.0), torch.ones(2, 3)]
    lent = Lent(buffers)
    for buffer in buffers:
        buffer.mul_(2).add_(1)
    taken = lent.take()
    lent.restore()
    assert [t.tolist() for t in taken] == [[1.0, 3.0, 5.0, 7.0, 9.0], [[3.0] * 3] * 2]
    assert [b.tolist() for b in buffers] == [[0.0, 1.0, 2.0, 3.0, 4.0], [[1.0] * 3] * 2]
    untaken = Lent(buffers)
    buffers[0].zero_()
    untaken.restore()
    assert buffers[0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
