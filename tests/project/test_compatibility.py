"""docs/compatibility.md: what people train with works and is measured exactly, or is refused with the reason."""

import json
import re
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import passk_guard
from passk_guard import GuardError, PassKGuardCallback
from passk_guard.sketch import ScoreSketcher
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_model
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error

PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
SETTINGS = {"k": 2, "num_samples": 4, "probe_prompts": 12, "refresh_steps": 1, "sketch_dim": 512}


def adapted(model, **settings):
    """A PEFT model whose B is not zero, which would leave A without a gradient."""
    model = get_peft_model(model, LoraConfig(r=4, **({"target_modules": ["q_proj", "down_proj"]} | settings)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    return model


def in_4_bit(model):
    """Each linear layer but the head in NF4, as `load_in_4bit` has them."""
    bnb = pytest.importorskip("bitsandbytes", reason="125 MB, with kernels for a GPU: not among the test requirements")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                bias, sizes = child.bias, (child.in_features, child.out_features)
                small = bnb.nn.Linear4bit(*sizes, bias=bias is not None, compute_dtype=torch.float32, quant_type="nf4")
                small.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                small.bias = bias
                setattr(module, name, small.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def qlora():
    return adapted(in_4_bit(tiny_model(hidden_size=64, intermediate_size=128)))


def resized():
    model = tiny_model()
    model.resize_token_embeddings(model.config.vocab_size + 12, mean_resizing=False)
    return model


def head_frozen():
    model = tiny_model(tie_word_embeddings=False)
    model.get_input_embeddings().requires_grad_(False)
    return model


class Fused(torch.autograd.Function):
    """x / rms(x) * w with a backward of its own, as Triton kernels have it."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, delta):
        x, weight, scale = ctx.saved_tensors
        g = delta * weight
        of_x = scale * (g - x * scale.square() * (g * x).mean(-1, keepdim=True))
        return of_x, (delta * x * scale).flatten(0, -2).sum(0), None


def norms_patched():
    """Liger gives instances of norms another forward, and has MLPs call their linear layers around a fused product."""
    model = tiny_model()

    def mlp(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = types.MethodType(
                lambda self, x: Fused.apply(x, self.weight, self.variance_epsilon), module
            )
        elif type(module).__name__.endswith("MLP"):
            module.forward = types.MethodType(mlp, module)
    return model


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
WORKS = {
    "qlora": (qlora, {}),
    "dora": (lambda: adapted(tiny_model(), use_dora=True), {}),
    "compiled": (tiny_model, COMPILED),
    "resized": (resized, {}),
    "frozen": (head_frozen, {}),
    "liger": (norms_patched, {}),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "compiled" else k for k in WORKS])
def test_scores_are_those_of_autograd_and_observing_changes_nothing(kind, tmp_path):
    make, args = WORKS[kind]

    def made():
        with torch.random.fork_rng():
            torch.manual_seed(0)  # new rows and adapters are random
            return make()

    model, batch = made(), ragged_batch()
    sketcher = ScoreSketcher(model, method="identity")
    found = sketcher.sketch(**batch, num_slots=6)
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-5
    assert sketcher.coverage.share == 1.0
    runs = []
    for guarded in (False, True):
        trainer = tiny_grpo_trainer(tmp_path / str(guarded), model=made(), max_steps=2, learning_rate=1e-2, **args)
        if guarded:
            passk_guard.watch(trainer, probe_rows(12), digit_reward, **SETTINGS)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        after = {n: p.detach() for n, p in trainer.model.named_parameters()}
        runs.append(after)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(before[name], after[name]) for name in after)
    events = [json.loads(line) for line in (tmp_path / "True/passk_guard.jsonl").open()]
    kinds = [event["event"] for event in events]
    assert (kinds.count("refresh"), kinds.count("change"), kinds.count("failed_refresh")) == (2, 1, 0), events


def with_hook():
    model = tiny_model()
    model.get_input_embeddings().weight.register_hook(lambda grad: grad * 0)
    return model


def by_unsloth():
    model = tiny_model()
    forward = types.FunctionType((lambda self, input_ids: None).__code__, {"__name__": "unsloth.models.llama"})
    model.forward = types.MethodType(forward, model)
    return model


class AsyncGRPOTrainer:
    """What the guard knows of TRL's by its name; the real one needs a vLLM server when it is made."""

    def __init__(self, trainer):
        self.__dict__ = trainer.__dict__

    def add_callback(self, callback):
        raise AssertionError


REFUSED = {
    "AsyncGRPOTrainer": (lambda path: AsyncGRPOTrainer(tiny_lm_trainer(path)), "found AsyncGRPOTrainer"),
    "unsloth": (lambda path: tiny_lm_trainer(path, model=by_unsloth()), "patched by unsloth"),
    "gradient hooks": (
        lambda path: tiny_lm_trainer(path, model=with_hook()),
        r"hooks on their gradients; found some on model\.embed_tokens\.weight",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_by_name(kind, tmp_path):
    make, message = REFUSED[kind]
    with pytest.raises(GuardError, match=message):
        passk_guard.watch(make(tmp_path), probe_rows(), digit_reward, **SETTINGS)


def test_rows_of_an_embedding_that_peft_trains_are_reported_as_not_seen():
    model = adapted(tiny_model(tie_word_embeddings=False), trainable_token_indices=[7, 8, 9])
    with pytest.warns(UserWarning, match=r"covers 93\.0% .*trainable_tokens_delta"):
        ScoreSketcher(model, method="identity")


def test_gradient_hooks_are_no_matter_to_the_realised_change(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, model=with_hook())
    PassKGuardCallback(trainer, probe_rows(), digit_reward, **SETTINGS, instruments="change")


def test_the_real_trainer_has_that_name_and_attention():
    module = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    assert module.AsyncGRPOTrainer.__name__ == "AsyncGRPOTrainer"
    assert "tree" in module.TREE_ATTENTION


def test_each_row_of_the_page_names_a_test_that_is_here():
    named = set(re.findall(r"`(\w[\w ]*)` in `tests/project/test_compatibility.py`", PAGE.read_text()))
    assert named == WORKS.keys() | REFUSED.keys()
