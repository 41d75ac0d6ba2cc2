"""The table of other libraries' names is complete: a new one that the sources touch fails here until it is listed.

What cannot be seen without running: a public name that a documented class of another library has too.
"""

import ast
import builtins
import importlib
import sys
import types
from argparse import ArgumentParser
from dataclasses import fields
from functools import cache

import datasets
import pydantic
import pytest
import torch
import torch.distributed as dist
import transformers
import trl
import yaml
from accelerate import Accelerator
from rich.table import Table
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.trainer_callback import TrainerState

from passk_guard.private_api import TABLE, seams
from tests.foreign_names import TREES, own_names, plain_names, private_names

CONFIGS = (transformers.TrainingArguments, trl.GRPOConfig, trl.RLOOConfig)
TORCH = (torch, nn, dist, dist.ReduceOp, torch.cuda, torch.accelerator, torch.autograd, FunctionCtx, torch.Generator)
TORCH += (torch.backends, torch.backends.cudnn, torch.linalg, torch.special, torch.random, torch.optim, nn.functional)
TORCH += (torch.Tensor, nn.Module, nn.Embedding(2, 2), nn.Linear(2, 2), nn.LayerNorm(2), torch.amp.GradScaler)
TORCH += (FSDPModule, DTensor, DeviceMesh)
TRANSFORMERS = (transformers.Trainer, transformers.TrainingArguments, transformers.PreTrainedModel, TrainerState())
TRANSFORMERS += (transformers.PreTrainedConfig, transformers.GenerationConfig, transformers.PreTrainedTokenizerBase)
OTHERS = (Accelerator, trl.GRPOConfig, trl.RLOOConfig, datasets.Dataset, datasets.IterableDataset, Table, SummaryWriter)
OTHERS += (pydantic.TypeAdapter, yaml, transformers.utils.logging, ArgumentParser, sys.stderr, tqdm)

ALLOWED = {
    "transformers documents these attributes of its Trainer and trl has them too": (
        *("model", "model_wrapped", "processing_class", "train_dataset", "state"),
    ),
    "in the documentation of transformers' models, configs, tokenizers and outputs": (
        *("generate", "generation_config", "logits", "tokenizer", "chat_template", "response_schema"),
        *("response_template", "max_position_embeddings", "num_hidden_layers", "eos_token_id", "bos_token_id"),
    ),
    "asked for by getattr with what it means to have none: a scale of 1, and a layer of no kind that is known": (
        *("embed_scale", "nf"),
    ),
    "documented by torch and set on instances, or made by it at run time": (
        *("process_group", "saved_tensors", "cudnn", "deterministic", "benchmark"),
    ),
    "numpy's random state, CPython's C interface, tqdm's count": (
        *("get_state", "set_state", "PyThreadState_SetAsyncExc", "n"),
    ),
    "wandb's and trackio's documented functions; what raises there is caught": ("alert", "Image", "AlertLevel"),
    "words of our own settings and of messages, beside names in a variable": (
        *("auto", "both", "reweight", "cooldown", "patience", "pcgrad", "meta", "muon", "nvme", "passk_guard"),
        *("false_alarms", "ks", "paper", "prompts", "degenerate", "solved", "failed", "before"),
    ),
    "documented: of pydantic's validation, torch's finfo and the standard library's reprlib": (
        *("field_name", "tiny", "maxlevel", "maxlong", "maxother", "maxstring"),
    ),
}
"""Names that are not in the table, by why they need not be."""

OF_OURS = {"_passk_guard_attached", "_undo", "_passk_guard_objective", "_se", "_passk_guard_layer"}
OF_OURS |= {"_passk_guard_patches", "_told_of"}
"""Private names of the package's own that are touched from outside of `self`, or stand in a string."""

OWN = own_names()
LISTED = {(file, row.name) for row in TABLE for file in row.files}


@cache
def documented():
    """Public names of classes and modules whose documentation says what they are for."""
    found = {name for owner in (*TORCH, *TRANSFORMERS, *OTHERS) for name in dir(owner) if not name.startswith("_")}
    found |= {field.name for config in CONFIGS for field in fields(config)}
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    for module in (name for name in modules if name.split(".")[0] in sys.stdlib_module_names):
        found |= _of_module(importlib.import_module(module))
    return found | _of_module(builtins) | _of_module(types)


def _of_module(module):
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return {name for owner in (module, *classes) for name in dir(owner)}


def unlisted(file, tree):
    """Names in `tree`, the contents of `file`, that stand neither in the table nor in the lists above."""
    allowed = documented().union(*ALLOWED.values(), (seam for seam in vars(seams) if seam.isupper()))
    plain = set(plain_names(file, tree, OWN)) - allowed
    return sorted(name for name in plain | (set(private_names(tree, OWN)) - OF_OURS) if (file, name) not in LISTED)


@pytest.mark.parametrize("file", TREES)
def test_every_name_of_another_library_is_in_the_table(file):
    assert unlisted(file, TREES[file]) == [], "touched, and not in passk_guard/private_api"


def test_no_row_is_stale():
    found = {(f, name) for f, tree in TREES.items() for name in (*plain_names(f, tree, OWN), *private_names(tree, OWN))}
    for row in TABLE:
        assert any((file, row.name) in found for file in row.files), f"nothing in {row.files} touches {row.name}"
        if row.name.startswith("_"):
            assert {(file, row.name) for file in row.files} <= found, f"not all of {row.files} touch {row.name}"


def test_nothing_is_allowed_that_is_not_touched():
    found = {name for file, tree in TREES.items() for name in plain_names(file, tree, OWN)}
    assert {name for names in ALLOWED.values() for name in names} <= found
    assert {name for tree in TREES.values() for name in private_names(tree, OWN)} >= OF_OURS


PLANTED = {
    "self._theirs": "_theirs",
    "x._a.b": "_a",
    "x.y._C": "_C",
    'getattr(x, "_b", 0)': "_b",
    'attributes["_c"]': "_c",
    'attrgetter("a._d")': "_d",
    "from torch._e import f": "_e",
    "import torch._f": "_f",
    'MethodPatch(trainer, "_g", make)': "_g",
    'MethodPatch(trainer, "renamed_step", make)': "renamed_step",
    "self._optimizer.ipg_buffer": "ipg_buffer",
    "self._engine.renamed": "renamed",
    "engine.estimate": "estimate",  # a name of ours too
    'hasattr(engine, "global_steps_")': "global_steps_",
    'delattr(trainer, "probe")': "probe",
    'def f(x):\n    for name in ("loss_scaler", ):\n        setattr(x, name, 0)': "loss_scaler",
    'def g(x, name):\n    return getattr(x, name)\ndef f(x):\n    return g(x, "zero_new")': "zero_new",
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_name_is_found(source):
    file = "engines/deepspeed_zero3.py"
    assert unlisted(file, ast.parse(source)) == [PLANTED[source]]


@pytest.mark.parametrize(
    "source", ["self._before_step()", 'f"{x}_c"', "x.__class__", "tensor.detach()", "trainer.model"]
)
def test_what_is_ours_or_documented_is_not(source):
    assert unlisted("engines/deepspeed_zero3.py", ast.parse(source)) == []
