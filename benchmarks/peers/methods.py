"""Per-sample gradients, or sketches of them, of one batch: by this package and by its peers, each as its docs say.

A method is a function of a `Problem` and a seed that sets itself up and returns a `Method`. A peer is imported inside
its own function, so that one that is not there leaves the others alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.peers.problem import Problem, sample_losses
from benchmarks.sketch_speed import cosines, plain

LINEAR_ONLY = "linear layers only; of a tied matrix the head's share"
DIM, SIDE, TRAK_DIM, TRAK_BLOCK = 16384, 64, 256, 32


@dataclass(frozen=True)
class Method:
    """One way to a batch's per-sample gradients.

    Attributes:
        run: once over the batch; its result goes to `cosines`.
        sees: names of the uses of parameters whose gradients enter, as in `Problem.sizes`.
        numbers: floats kept of each sample, 0 where there are no vectors.
        cosines: of all pairs of samples, from what `run` returned; None where a run does not tell.
    """

    run: Callable[[], Any]
    sees: set[str]
    numbers: int
    cosines: Callable[[Any], Tensor] | None = cosines


def all_names(problem: Problem) -> set[str]:
    return set(problem.sizes)


def plain_training(problem: Problem, seed: int) -> Method:
    """One forward and backward of the whole batch: what every time is a ratio to."""
    batch = {
        "input_ids": problem.input_ids,
        "completion_mask": problem.completion_mask,
        "attention_mask": torch.ones_like(problem.input_ids),
    }
    return Method(lambda: plain(problem.model, batch, "train"), all_names(problem), 0, None)


def guard(method: str, grouped: bool) -> Callable[[Problem, int], Method]:
    """This package: `grouped` sums the samples into two rows, as a refresh does for one prompt."""

    def set_up(problem: Problem, seed: int) -> Method:
        from passk_guard.sketch import ScoreSketcher

        sketcher = ScoreSketcher(problem.model, DIM, method, seed)
        samples = len(problem.input_ids)
        rows = 2 if grouped else samples
        arguments = (problem.input_ids, torch.ones_like(problem.input_ids), problem.completion_mask)
        sees = all_names(problem) if sketcher.coverage.share == 1 else set()
        return Method(
            lambda: sketcher.sketch(*arguments, torch.arange(samples) % rows, rows),
            sees,
            DIM,
            None if grouped else cosines,
        )

    return set_up


def torch_func(chunk: int | None) -> Callable[[Problem, int], Method]:
    """torch.func: vmap of grad, over all samples at once or `chunk` of them."""

    def set_up(problem: Problem, seed: int) -> Method:
        parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
        size = sum(p.numel() for p in parameters.values())
        return Method(lambda: _vmapped(problem, parameters, chunk), all_names(problem), size)

    return set_up


def _vmapped(problem: Problem, parameters: dict[str, Tensor], chunk: int | None) -> Tensor:
    def loss(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        logits = functional_call(problem.model, weights, (), {"input_ids": ids[None], "use_cache": False}).logits
        return sample_losses(logits, ids[None], mask[None]).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)
    gradients = per_sample(parameters, problem.input_ids, problem.completion_mask)
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def opacus(problem: Problem, seed: int) -> Method:
    """Opacus: `grad_sample` of every parameter, from hooks, functorch where a layer has no rule of its own."""
    from opacus import GradSampleModule

    # Its hooks keep activations in train mode only; this model has no dropout.
    model = GradSampleModule(problem.model.train(), batch_first=True, loss_reduction="sum")

    def run() -> Tensor:
        logits = model(input_ids=problem.input_ids, use_cache=False).logits
        problem.losses(logits).sum().backward()
        rows = torch.cat([_one(p.grad_sample).flatten(1) for p in model.parameters()], 1)
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.grad_sample = None
        return rows

    return Method(run, all_names(problem), sum(p.numel() for p in model.parameters()))


def _one(found: Tensor | list[Tensor]) -> Tensor:
    """A parameter used twice in a forward has a list of them, to be added up."""
    return torch.stack(found).sum(0) if isinstance(found, list) else found


def bergson(problem: Problem, seed: int) -> Method:
    """bergson: two-sided projections of each linear layer, by its collector's hooks; frozen as its builder does."""
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from datasets import Dataset

    model = problem.model
    folder = tempfile.mkdtemp()
    collector = GradientCollector(
        model=model,
        data=Dataset.from_dict({"input_ids": problem.input_ids.tolist()}),
        cfg=IndexConfig(folder, projection_dim=SIDE),
        processor=GradientProcessor(projection_dim=SIDE, projection_seed=seed),
        skip_index=True,
    )

    def run() -> Tensor:
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        mask = torch.ones_like(problem.input_ids, dtype=torch.bool)
        try:
            with collector.with_batch(mask):
                problem.losses(model(input_ids=problem.input_ids, use_cache=False).logits).sum().backward()
            return torch.cat([*collector.mod_grads.values()], 1)
        finally:
            collector.mod_grads.clear()
            model.requires_grad_(True)
            model.zero_grad(set_to_none=True)

    return Method(run, _linear(problem, biases=False), SIDE * SIDE * len(collector.target_info))


def dattri_logra(problem: Problem, seed: int) -> Method:
    """dattri's LoGra: Kronecker-factored projections of each linear layer, with its own hooks and compressors."""
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    model = problem.model
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    common = {"device": "cpu", "proj_max_batch_size": 64, "proj_seed": seed}
    compressors = setup_model_compressors(
        model,
        layers,
        sparsifier_kwargs=common | {"proj_dim": SIDE, "proj_type": "normal"},
        projector_kwargs=common | {"proj_dim": -1, "proj_type": "identity"},
        sample_inputs={"input_ids": problem.input_ids},
        device="cpu",
    )
    hooks = HookManager(model, layers, device="cpu")
    hooks.set_compressors(compressors)

    def run() -> Tensor:
        hooks.enable_hooks()
        problem.losses(model(input_ids=problem.input_ids, use_cache=False).logits).sum().backward()
        rows = torch.cat([g.flatten(1) for g in hooks.get_compressed_grads()], 1)
        model.zero_grad(set_to_none=True)
        hooks.disable_hooks()  # the plain step in between is the model's own
        return rows

    return Method(run, _linear(problem, biases=True), SIDE * SIDE * len(layers))


def _linear(problem: Problem, biases: bool) -> set[str]:
    layers = [name for name, module in problem.model.named_modules() if isinstance(module, torch.nn.Linear)]
    kinds = ("weight", "bias") if biases else ("weight",)
    return {f"{layer}.{kind}" for layer in layers for kind in kinds} & set(problem.sizes)


def trak(problem: Problem, seed: int) -> Method:
    """TRAK: vmapped gradients through its CPU projector, dense signs made anew block by block."""
    from trak.projectors import BasicProjector, ProjectionType

    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in parameters.values()),
        proj_dim=TRAK_DIM,
        seed=seed,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
        block_size=TRAK_BLOCK,
    )
    return Method(
        lambda: projector.project(_vmapped(problem, parameters, None), model_id=0), all_names(problem), TRAK_DIM
    )


def autogram(problem: Problem, seed: int) -> Method:
    """TorchJD's autogram: the Gram matrix of the samples' gradients, without vectors."""
    from torchjd.autogram import Engine

    model = problem.model
    engine = Engine(model, batch_dim=0)

    def run() -> Tensor:
        return engine.compute_gramian(problem.losses(model(input_ids=problem.input_ids, use_cache=False).logits))

    return Method(run, all_names(problem), 0, _of_gram)


def _of_gram(gram: Tensor) -> Tensor:
    gram = gram.double()
    norms = gram.diagonal().sqrt()
    pairs = torch.triu_indices(len(gram), len(gram), 1)
    return (gram / norms[:, None] / norms)[pairs[0], pairs[1]]


METHODS: dict[str, tuple[Callable[[Problem, int], Method], str | None, str]] = {
    "plain forward+backward": (plain_training, None, ""),
    "kronecker, sums of two groups": (guard("kronecker", grouped=True), None, ""),
    "kronecker, each sample": (guard("kronecker", grouped=False), None, ""),
    "countsketch, sums of two groups": (guard("countsketch", grouped=True), None, ""),
    "countsketch, each sample": (guard("countsketch", grouped=False), None, ""),
    "bergson, 64 x 64 a layer": (bergson, "bergson", LINEAR_ONLY),
    "dattri LoGra, 64 x 64 a layer": (dattri_logra, "dattri", LINEAR_ONLY),
    "Opacus": (opacus, "opacus", ""),
    "torch.func vmap, all": (torch_func(None), "torch", ""),
    "torch.func vmap, chunks of 4": (torch_func(4), "torch", ""),
    "vmap + TRAK BasicProjector, 256": (trak, "traker", "its CUDA projector (fast_jl) needs a GPU"),
    "TorchJD autogram": (autogram, "torchjd", "a Gram matrix of this batch alone, no vectors"),
}
"""What sets it up, the distribution it comes from (None: this package), and a remark."""
