"""Names of other libraries that may go away: each is in one table, and a missing one is an error at train begin."""

from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective
from passk_guard.callback.setup import check_compatibility
from passk_guard.mitigation.engines.choose import choose_engine
from passk_guard.mitigation.engines.deepspeed.choose import deepspeed_engine
from passk_guard.probe.samplers import BatchTap, TRLSampler
from passk_guard.utils import private_api
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import TABLE, check, seams
from passk_guard.utils.private_api import check as versions
from tests.helpers.tiny import digit_reward, tiny_grpo_trainer, tiny_model, tiny_rloo_trainer, tiny_rows
from tests.mitigation.engines import neutral

REQUIRED = [row for row in TABLE if row.required]


def test_each_name_stands_once():
    places = [(row.seam, row.name) for row in TABLE]
    assert len(set(places)) == len(places)
    assert all(row.purpose for row in TABLE)


def having(seam, without=""):
    """A stand-in of `seam.owner` with all that is required of it but `without`."""
    names = [row.name for row in REQUIRED if row.seam == seam and row.name != without]
    return type("StandIn", (), dict.fromkeys(names))()


@pytest.mark.parametrize("row", REQUIRED, ids=lambda row: f"{row.seam.owner}.{row.name}")
def test_a_missing_name_is_an_error_that_says_all(row):
    check(row.seam, having(row.seam))
    check(row.seam, type(having(row.seam)))
    with pytest.raises(GuardError) as refusal:
        check(row.seam, having(row.seam, without=row.name))
    library = row.seam.library
    for said in (row.name, row.purpose, row.seam.applies, row.seam.instead, library, "StandIn"):
        assert said in str(refusal.value)
    assert f"{library} {version(library)}, which lacks" in str(refusal.value)
    assert f"{library} {private_api.supported(library)} for" in str(refusal.value)


def test_ranges_are_those_of_the_metadata(monkeypatch):
    lines = ["torch>=2.6", "torchjd>=0.18; extra == 'torchjd'", "trl<2,>=1.0; extra == 'trl'"]
    monkeypatch.setattr(versions, "requires", lambda _: lines)
    assert [private_api.supported(name) for name in ("torch", "trl")] == [">=2.6", "<2,>=1.0"]
    assert "pyproject.toml" in private_api.supported("deepspeed")


def test_without_metadata_the_error_still_comes(monkeypatch):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(versions, "requires", missing)
    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(GuardError, match=r"pyproject\.toml.*not installed"):
        check(seams.ENGINE, object())


def test_a_property_that_raises_is_there():
    class Engine(type(having(seams.ENGINE))):
        @property
        def device(self):
            raise RuntimeError("not yet")

    check(seams.ENGINE, Engine())


def test_an_unknown_seam_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="seam"):
        check(private_api.Seam("torch", "Nothing", "", ""), object())


# In the wiring: each seam is asked about where it applies, and nowhere else


def hide(monkeypatch, obj, name):
    """As if a release had renamed it."""
    if name in vars(obj):
        monkeypatch.delattr(obj, name)
    for kind in type(obj).__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)


def begin(guard, trainer):
    guard.on_train_begin(trainer.args, trainer.state, trainer.control)
    guard.on_train_end(trainer.args, trainer.state, trainer.control)


def guarded(trainer, **settings):
    probe = None if settings.get("source") == "training_batch" else tiny_rows(8)
    return PassKGuardCallback(trainer, probe, digit_reward, GuardConfig(k=2, allow_overlap=True, **settings))


SAMPLED = [row.name for row in REQUIRED if row.seam == seams.SAMPLER]
TAPPED = [row.name for row in REQUIRED if row.seam == seams.BATCH]


@pytest.mark.parametrize("make", [tiny_grpo_trainer, tiny_rloo_trainer])
@pytest.mark.parametrize("name", SAMPLED)
def test_what_samples_held_out_prompts(make, name, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    guard, on_the_batch = guarded(trainer), guarded(trainer, source="training_batch")
    begin(guard, trainer)
    hide(monkeypatch, trainer, name)
    if name != "temperature":  # that of a batch is asked for too
        begin(on_the_batch, trainer)
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        begin(guard, trainer)
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        TRLSampler(trainer)
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        guarded(trainer)  # and not another sampler in silence


@pytest.mark.parametrize("make", [tiny_grpo_trainer, tiny_rloo_trainer])
@pytest.mark.parametrize("name", TAPPED)
def test_what_reads_the_training_batch(make, name, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    trainer.args.scale_rewards = "none"
    held_out, on_the_batch = guarded(trainer), guarded(trainer, source="training_batch")
    begin(on_the_batch, trainer)
    objective = PassKObjective(trainer, k=2)
    hide(monkeypatch, trainer, name)
    begin(held_out, trainer)
    for refused in (lambda: PassKObjective(trainer, k=2), lambda: BatchTap(trainer, print)):
        with pytest.raises(GuardError, match=f"lacks `{name}`"):
            refused()
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        begin(on_the_batch, trainer)
    monkeypatch.setattr(trainer, "_passk_guard_objective", objective, raising=False)
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        begin(held_out, trainer)


def asked(trainer, **settings):
    vars(trainer).setdefault("callback_handler", SimpleNamespace(callbacks=[]))
    check_compatibility(trainer, None, **{"taps_batch": False, "turns_gradients": False} | settings)


@pytest.mark.parametrize("name", [row.name for row in REQUIRED if row.seam == seams.MODULE])
def test_hooks_of_modules(name):
    trainer = SimpleNamespace(model=nn.Linear(2, 2))
    asked(trainer)
    delattr(trainer.model, name)
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        asked(trainer)


def test_the_callbacks_of_a_trainer(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path)
    guard = guarded(trainer)
    begin(guard, trainer)
    del trainer.callback_handler
    with pytest.raises(GuardError, match="lacks `callback_handler`"):
        begin(guard, trainer)


def test_the_shape_of_a_weight_that_zero3_has_emptied():
    trainer = SimpleNamespace(model=nn.Linear(2, 2))
    trainer.model.weight.data = torch.zeros(0)
    asked(trainer)  # empty, and not DeepSpeed's
    trainer.model.weight.ds_id, trainer.model.weight.ds_shape = 1, (2, 2)
    asked(trainer)
    del trainer.model.weight.ds_shape
    with pytest.raises(GuardError, match="lacks `ds_shape`"):
        asked(trainer)


def test_versions_of_tensors(monkeypatch):
    monkeypatch.setattr("passk_guard.callback.setup.torch.Tensor", object)
    with pytest.raises(GuardError, match="lacks `_version`"):
        asked(SimpleNamespace(model=nn.Linear(2, 2)))


def test_the_checkpointing_of_transformers():
    trainer = SimpleNamespace(model=tiny_model())
    asked(trainer)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    asked(trainer)
    for layer in trainer.model.model.layers:
        del layer._gradient_checkpointing_func
    with pytest.raises(GuardError, match="lacks `_gradient_checkpointing_func`"):
        asked(trainer)
    trainer.model.gradient_checkpointing_disable()
    asked(trainer)


def test_a_model_that_checkpoints_by_itself_is_left_alone():
    model = nn.Linear(2, 2)
    model.gradient_checkpointing = True
    asked(SimpleNamespace(model=model))


def test_what_accelerate_says_of_the_engine():
    accelerator = Accelerator(cpu=True)
    trainer = SimpleNamespace(model=nn.Linear(2, 2), accelerator=accelerator)
    asked(trainer, turns_gradients=True)
    del accelerator.has_lomo_optimizer
    asked(trainer)
    with pytest.raises(GuardError, match="lacks `has_lomo_optimizer`"):
        asked(trainer, turns_gradients=True)
    kind = SimpleNamespace(value="DEEPSPEED")
    trainer.accelerator = SimpleNamespace(has_lomo_optimizer=False, scaler=None, distributed_type=kind)
    with pytest.raises(GuardError, match="lacks `deepspeed_engine_wrapped`"):
        asked(trainer, turns_gradients=True)
    trainer.accelerator.deepspeed_engine_wrapped = None
    asked(trainer, turns_gradients=True)


def test_projecting_asks_accelerate(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path)
    observing, projecting = guarded(trainer), guarded(trainer, mitigation="project")
    begin(projecting, trainer)
    del trainer.accelerator.has_lomo_optimizer
    begin(observing, trainer)
    with pytest.raises(GuardError, match="lacks `has_lomo_optimizer`"):
        begin(projecting, trainer)


def plain(model):
    return SimpleNamespace(accelerator=Accelerator(cpu=True), model=model, model_wrapped=model)


def test_a_plain_model(monkeypatch):
    class Parameter(nn.Parameter):
        @property
        def _post_accumulate_grad_hooks(self):
            raise AttributeError

    model = nn.Linear(2, 2)
    assert choose_engine(plain(model)).name == "plain"
    model.weight = Parameter(torch.zeros(2, 2))
    with pytest.raises(GuardError, match="lacks `_post_accumulate_grad_hooks`"):
        choose_engine(plain(model))


def test_a_compiled_model():
    class OptimizedModule(nn.Module):
        pass

    compiled = torch.compile(nn.Linear(2, 2))
    assert choose_engine(plain(compiled)).name == "plain"
    with pytest.raises(GuardError, match="lacks `_orig_mod`"):
        choose_engine(plain(OptimizedModule()))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("seam", [seams.FSDP, seams.FSDP_STATE], ids=lambda seam: seam.owner)
def test_fsdp2(seam, one_process, monkeypatch):
    model = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    assert choose_engine(plain(model)).name == "fsdp2"
    [name] = [row.name for row in REQUIRED if row.seam == seam]
    hide(monkeypatch, model._get_fsdp_state() if seam == seams.FSDP_STATE else model, name)
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        choose_engine(plain(model))


DEEPSPEED = {
    "BF16_Optimizer": (seams.BF16,),
    "DeepSpeedZeroOptimizer": (seams.ZERO12,),
    "DeepSpeedZeroOptimizer offloaded": (seams.ZERO12, seams.ZERO12_OFFLOAD),
    "DeepSpeedZeroOptimizer_Stage3": (seams.ZERO3,),
    "DeepSpeedZeroOptimizer_Stage3 offloaded": (seams.ZERO3, seams.ZERO3_OFFLOAD),
}


def under_deepspeed(kind, optimizer_without="", engine_without=""):
    """A trainer whose DeepSpeed engine and optimizer are stand-ins."""
    names = {r.name for r in REQUIRED if r.seam in DEEPSPEED[kind]} - {optimizer_without}
    offloaded = kind.endswith("offloaded")
    switches = dict.fromkeys(names & {"cpu_offload", "offload_optimizer"}, offloaded)
    answers = {name: value for name, value in neutral.OPTIMIZER.items() if name in names}
    sharder = SimpleNamespace(partition_all_parameters=print)
    answers |= {"parameter_offload": sharder} if "parameter_offload" in names else {}
    optimizer = type(kind.split()[0], (), dict.fromkeys(names) | switches | answers)()
    engine = SimpleNamespace(**{r.name: print for r in REQUIRED if r.seam == seams.ENGINE} | neutral.ENGINE)
    engine.optimizer, engine.module = optimizer, nn.Linear(1, 1)
    for parameter in engine.module.parameters():
        parameter.ds_status, parameter.all_gather = None, print
    if engine_without:
        delattr(engine, engine_without)
    wrapper = SimpleNamespace(engine=engine)
    return SimpleNamespace(accelerator=SimpleNamespace(deepspeed_engine_wrapped=wrapper))


@pytest.mark.parametrize(
    ("kind", "name"), [(k, row.name) for k, seams in DEEPSPEED.items() for row in REQUIRED if row.seam in seams]
)
def test_deepspeeds_optimizers(kind, name):
    assert deepspeed_engine(under_deepspeed(kind)).name.startswith("DeepSpeed ZeRO")
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        deepspeed_engine(under_deepspeed(kind, optimizer_without=name))


@pytest.mark.parametrize("name", [row.name for row in REQUIRED if row.seam in (seams.ENGINE, seams.SETTINGS)])
def test_deepspeeds_engine(name):
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        deepspeed_engine(under_deepspeed("BF16_Optimizer", engine_without=name))


@pytest.mark.parametrize("name", ["partition_all_parameters", "ds_status", "all_gather"])
def test_what_zero3_shards_with(name):
    trainer = under_deepspeed("DeepSpeedZeroOptimizer_Stage3")
    engine = trainer.accelerator.deepspeed_engine_wrapped.engine
    for obj in (engine.optimizer.parameter_offload, *engine.module.parameters()):
        vars(obj).pop(name, None)
    with pytest.raises(GuardError, match=f"lacks `{name}`"):
        deepspeed_engine(trainer)


def test_accelerates_wrapper_of_the_engine():
    with pytest.raises(GuardError, match="lacks `engine`"):
        deepspeed_engine(SimpleNamespace(accelerator=SimpleNamespace(deepspeed_engine_wrapped=object())))
