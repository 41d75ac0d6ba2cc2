"""Names of other libraries that may go away: a missing one is an error when train() begins or an engine is chosen."""

import importlib
import importlib.metadata
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import passk_guard
from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective
from passk_guard.callback.setup import Attachment, check_compatibility
from passk_guard.mitigation.engines import choose, untraced
from passk_guard.mitigation.engines.backward import BackwardEngine
from passk_guard.mitigation.engines.deepspeed import choose as deepspeed
from passk_guard.mitigation.engines.deepspeed import restore
from passk_guard.mitigation.engines.deepspeed.base import DeepSpeedGradient
from passk_guard.mitigation.engines.deepspeed.stages import Bf16, Zero3, Zero3Offload, Zero12, Zero12Offload
from passk_guard.mitigation.engines.native import NativeEngine, ShardedEngine
from passk_guard.probe.samplers import BatchTap, TRLSampler
from passk_guard.probe.samplers.trajectories import Trajectories
from passk_guard.sketch.coverage import SHARDED_NEEDS
from passk_guard.utils import isolation, private_api
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import Requires, requires
from tests.helpers.tiny import digit_reward, tiny_grpo_trainer, tiny_model, tiny_rloo_trainer, tiny_rows
from tests.mitigation.engines import neutral


def declared():
    """Every `requires(...)` of the package's modules and classes."""
    names = [info.name for info in pkgutil.walk_packages(passk_guard.__path__, "passk_guard.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    classes = [one for module in modules for one in vars(module).values() if isinstance(one, type)]
    return [needs for place in modules + classes for needs in vars(place).values() if isinstance(needs, Requires)]


def having(needs):
    """A stand-in of `needs.owner`."""
    return type("StandIn", (), dict.fromkeys(needs.names))()


def test_ranges_are_those_of_the_metadata(monkeypatch):
    lines = ["torch>=2.6", "torchjd>=0.18; extra == 'torchjd'", "trl<2,>=1.0; extra == 'trl'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    assert [private_api.supported(name) for name in ("torch", "trl")] == [">=2.6", "<2,>=1.0"]
    assert "pyproject.toml" in private_api.supported("deepspeed")


def test_without_metadata_the_error_still_comes(monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(GuardError, match=r"pyproject\.toml.*not installed"):
        requires("torch", "Tensor", "", "", invented="").check(object())


def test_a_property_that_raises_exists():
    class Engine:
        @property
        def device(self):
            raise RuntimeError("not yet")

    requires("deepspeed", "DeepSpeedEngine", "", "", device="").check(Engine())


# Each declaration is checked where the names are used. A scene returns the owner of the names, and what needs them.


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


def begins_with(model, owner=None):
    trainer = SimpleNamespace(model=model, callback_handler=None)
    return (model if owner is None else owner), lambda: check_compatibility(trainer, None, taps_batch=False)


def checkpointed(folder):
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return begins_with(model, model.model.layers[-1])


def emptied(folder):
    model = nn.Linear(2, 2)
    model.weight.data = torch.zeros(0)
    model.weight.ds_id, model.weight.ds_shape = 1, (2, 2)
    return begins_with(model, model.weight)


def a_train(folder, make=tiny_grpo_trainer, owner=lambda trainer: trainer, **settings):
    trainer = make(folder, scale_rewards="none") if make is tiny_grpo_trainer else make(folder)
    guard = guarded(trainer, **settings)
    return owner(trainer), lambda: begin(guard, trainer)


def projecting(folder):
    return a_train(folder, owner=lambda trainer: trainer.accelerator, mitigation="project")


def a_part(make):
    def scene(folder):
        trainer = tiny_rloo_trainer(folder)
        return trainer, lambda: make(trainer)

    return scene


def with_a_tool(folder):
    trainer = tiny_grpo_trainer(folder)
    trainer.tools = [print]
    trainer._standalone_tools, trainer._multi_environment = [print], False  # which an earlier TRL lacks
    return trainer, lambda: TRLSampler(trainer)


def with_vllm(folder):
    trainer = tiny_grpo_trainer(folder)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, SimpleNamespace(), 0
    return trainer, lambda: TRLSampler(trainer)


def objective_installed(folder):
    trainer = tiny_grpo_trainer(folder, scale_rewards="none")
    guard = guarded(trainer)
    PassKObjective(trainer, k=2).install()
    return trainer, lambda: begin(guard, trainer)


def choosing(model, owner=None):
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), model=model, model_wrapped=model)
    return trainer.accelerator if owner is None else owner, lambda: choose.choose_engine(trainer)


def a_module(folder):
    model, trainer = having(NativeEngine.module_needs), SimpleNamespace(accelerator=Accelerator(cpu=True))
    type(model).parameters = lambda self: iter([nn.Parameter(torch.ones(1))])
    return model, lambda: NativeEngine(trainer, model)


def a_compiled_model(folder):
    model = type("OptimizedModule", (nn.Module,), {"_orig_mod": nn.Linear(2, 2)})()
    return choosing(model, model)


def sharded(owner):
    def scene(folder):
        model = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
        return choosing(model, owner(model))

    return scene


def launched(folder):
    kind = SimpleNamespace(value="DEEPSPEED")
    found = SimpleNamespace(device=torch.device("cpu"), scaler=None, has_lomo_optimizer=False, distributed_type=kind)
    found.deepspeed_engine_wrapped = None
    model = nn.Linear(2, 2)
    return found, lambda: choose.choose_engine(SimpleNamespace(accelerator=found, model_wrapped=model))


def under_deepspeed(kind, owner):
    """A trainer whose DeepSpeed engine and optimizer are stand-ins with the names that are declared for them."""

    def scene(folder):
        answers = neutral.OPTIMIZER | {"cpu_offload": False, "parameter_offload": having(Zero3.sharder_needs)}
        answers |= dict.fromkeys(("cpu_offload", "offload_optimizer"), "Offload" in kind.__name__)
        attributes = dict.fromkeys(kind.needs.names) | {n: v for n, v in answers.items() if n in kind.needs.names}
        engine = SimpleNamespace(**dict.fromkeys(DeepSpeedGradient.engine_needs.names, print) | neutral.ENGINE)
        engine.optimizer, engine.module = type(kind.needs.owner, (), attributes)(), nn.Linear(1, 1)
        for parameter in engine.module.parameters():
            parameter.ds_status, parameter.all_gather = None, print
        wrapper = SimpleNamespace(engine=engine)
        trainer = SimpleNamespace(accelerator=SimpleNamespace(deepspeed_engine_wrapped=wrapper))
        return owner(wrapper), lambda: deepspeed.deepspeed_engine(trainer)

    return scene


def an_optimizer(kind):
    return under_deepspeed(kind, lambda wrapper: wrapper.engine.optimizer)


def traced(owner):
    def scene(folder):
        coordinator, sharder = having(restore.TRACE_NEEDS), having(restore.TRACER_NEEDS)
        type(coordinator).is_invalid_trace = lambda self: True
        type(sharder).get_param_coordinator = lambda self: coordinator
        wrapped = SimpleNamespace(optimizer=SimpleNamespace(parameter_offload=sharder))
        return {"sharder": sharder, "coordinator": coordinator}[owner], lambda: untraced(wrapped).__enter__()

    return scene


SCENES = [
    (isolation.MODULE_NEEDS, lambda folder: begins_with(nn.Linear(2, 2))),
    (isolation.LAYER_NEEDS, checkpointed),
    (SHARDED_NEEDS, emptied),
    (Attachment.needs, a_train),
    (TRLSampler.needs, a_train),
    (TRLSampler.needs, lambda folder: a_train(folder, tiny_rloo_trainer)),
    (TRLSampler.needs, a_part(TRLSampler)),
    (TRLSampler.needs, a_part(guarded)),  # and not another sampler in silence
    (TRLSampler.vllm_needs, with_vllm),
    (Trajectories.needs, with_a_tool),
    (BatchTap.needs, lambda folder: a_train(folder, source="training_batch")),
    (BatchTap.needs, a_part(lambda trainer: BatchTap(trainer, print))),
    (PassKObjective.needs, a_part(lambda trainer: PassKObjective(trainer, k=2))),
    (PassKObjective.needs, objective_installed),
    (BackwardEngine.accelerator_needs, lambda folder: choosing(nn.Linear(2, 2))),
    (BackwardEngine.accelerator_needs, projecting),
    (NativeEngine.module_needs, a_module),
    (choose.COMPILED_NEEDS, a_compiled_model),
    (choose.DEEPSPEED_NEEDS, launched),
    (ShardedEngine.module_needs, sharded(lambda model: model)),
    (ShardedEngine.state_needs, sharded(lambda model: model._get_fsdp_state())),
    (deepspeed.WRAPPER_NEEDS, under_deepspeed(Bf16, lambda wrapper: wrapper)),
    (deepspeed.SETTINGS_NEEDS, under_deepspeed(Bf16, lambda wrapper: wrapper.engine)),
    (DeepSpeedGradient.engine_needs, under_deepspeed(Zero12, lambda wrapper: wrapper.engine)),
    *((kind.needs, an_optimizer(kind)) for kind in (Bf16, Zero12, Zero12Offload, Zero3, Zero3Offload)),
    (Zero3.sharder_needs, under_deepspeed(Zero3, lambda wrapper: wrapper.engine.optimizer.parameter_offload)),
    (Zero3.parameter_needs, under_deepspeed(Zero3, lambda wrapper: next(wrapper.engine.module.parameters()))),
    (restore.TRACER_NEEDS, traced("sharder")),
    (restore.TRACE_NEEDS, traced("coordinator")),
]
ELSEWHERE = [isolation.TENSOR_NEEDS, NativeEngine.parameter_needs]  # in C, from where a test takes nothing away


def test_each_declaration_has_a_scene():
    reached = [needs for needs, _ in SCENES] + ELSEWHERE
    assert [needs for needs in declared() if needs not in reached] == []


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("needs", "scene"), SCENES, ids=lambda one: one.owner if isinstance(one, Requires) else "")
def test_a_missing_name_is_an_error_with_versions_and_remedy(needs, scene, one_process, tmp_path):
    owner, use = scene(tmp_path)
    use()
    library, versions = needs.library, (private_api.supported(needs.library), private_api.installed(needs.library))
    for name, purpose in needs.names.items():
        with pytest.MonkeyPatch.context() as patch:
            hide(patch, owner, name)
            with pytest.raises(GuardError) as refusal:
                use()
        assert f"Expected a {needs.owner} of {library} {versions[0]} for {needs.applies}; found " in str(refusal.value)
        assert f"{library} {versions[1]}, which lacks `{name}` ({purpose}). Install a supp" in str(refusal.value)
        assert str(refusal.value).endswith(f"this release of passk_guard, or {needs.instead}.")


def test_a_held_out_guard_does_without_what_reads_the_training_batch(tmp_path, monkeypatch):
    trainer = tiny_grpo_trainer(tmp_path)
    guard = guarded(trainer)
    hide(monkeypatch, trainer, "_calculate_rewards")
    hide(monkeypatch, trainer.accelerator, "has_lomo_optimizer")
    begin(guard, trainer)


def test_versions_of_tensors(monkeypatch):
    monkeypatch.setattr("passk_guard.utils.isolation.torch.Tensor", object)
    with pytest.raises(GuardError, match="lacks `_version`"):
        begins_with(nn.Linear(2, 2))[1]()


def test_hooks_of_parameters():
    class Parameter(nn.Parameter):
        @property
        def _post_accumulate_grad_hooks(self):
            raise AttributeError

    model = nn.Linear(2, 2)
    model.weight = Parameter(torch.zeros(2, 2))
    with pytest.raises(GuardError, match="lacks `_post_accumulate_grad_hooks`"):
        choosing(model)[1]()


def test_models_that_need_no_such_name_are_not_asked_for_it():
    model = nn.Linear(2, 2)
    model.weight.data = torch.zeros(0)  # empty, and not DeepSpeed's
    model.gradient_checkpointing = True  # checkpoints by itself
    begins_with(model)[1]()
