"""What a guarded run must equal: the same steps in one process of textbook PyTorch.

The run: fixed batches sharded over `ranks`, gradient accumulation, at each step boundary the gradient p of a probe
loss that opposes the training loss, the edit g += coefficient p, then clipping, then the optimizer.
"""

from dataclasses import dataclass

import torch

from tests.helpers.tiny import tiny_model

VOCABULARY, LENGTH = 76, 7


@dataclass(frozen=True)
class Recipe:
    """One run. `model` is a kind of `tiny_model`, or "tied", "lora" or "unused" (a parameter no loss reaches)."""

    model: str = "llama"
    ranks: int = 1
    optimizer: str = "adamw"  # or "sgd"; its learning rate is ten times larger
    steps: int = 3
    accumulation: int = 2
    chunks: int = 2
    gamma: float | None = 0.2  # None: no edit
    learning_rate: float = 1e-2
    max_norm: float = 0.5
    weight_decay: float = 0.01
    dtype: str = "float32"


def build_model(recipe):
    """The model before training: the same weights on every call."""
    return _build(recipe.model).to(getattr(torch, recipe.dtype))


def _build(name):
    # No size is a multiple of 2 and of 3. Weights of 0.3, as elsewhere, would amplify rounding errors tenfold.
    shape = {"hidden_size": 18, "intermediate_size": 27, "head_dim": 10, "initializer_range": 0.1}
    if name == "tied":
        return tiny_model("qwen2", tie_word_embeddings=True, **shape)
    if name == "lora":
        return _with_lora(tiny_model("llama", **shape))
    if name == "unused":
        model = tiny_model("llama", **shape)
        model.never_used = torch.nn.Parameter(torch.ones(5))
        return model
    return tiny_model(name, **shape)


def _with_lora(model):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(5)
        adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at the start, which would leave lora_A without a gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def tokens(*key):
    """[2, LENGTH] token ids of one batch, determined by its key."""
    seed = sum((part + 1) * 1009**place for place, part in enumerate(key))
    return torch.randint(6, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def training_batches(recipe, rank):
    """This rank's micro-batches in order, `accumulation` of them a step."""
    return [
        {"input_ids": tokens(0, step, micro, rank)}
        for step in range(recipe.steps)
        for micro in range(recipe.accumulation)
    ]


def probe_batches(recipe, rank):
    """This rank's chunks of the probe, the same ones at every step."""
    return [{"input_ids": tokens(1, chunk, rank)} for chunk in range(recipe.chunks)]


def training_loss(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def probe_loss(model, batch):
    """Opposes the training loss, and differs from chunk to chunk in size."""
    return -0.3 * batch["input_ids"].float().mean() / VOCABULARY * training_loss(model, batch)


def make_optimizer(recipe, parameters):
    if recipe.optimizer == "sgd":
        rate = 10 * recipe.learning_rate
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=recipe.weight_decay)
    # A larger eps: at 1e-8 the first step is sign(g), which turns rounding errors of tiny entries into whole steps.
    return torch.optim.AdamW(parameters, lr=recipe.learning_rate, eps=1e-4, weight_decay=recipe.weight_decay)


def gradient_of(model, parameters, loss, batches_by_rank):
    """Sum over batches, mean over ranks: one list entry a parameter, None where no loss reaches it."""
    total = sum(loss(model, batch) for batches in batches_by_rank for batch in batches)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    # Divided here and not in the loss, which transformers computes in float32 whatever the weights are in.
    return [None if gradient is None else gradient / len(batches_by_rank) for gradient in gradients]


def full_probe_gradient(model, recipe):
    """The vector p of this model over all ranks, by name; zeros where no loss reaches."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batches = [probe_batches(recipe, rank) for rank in range(recipe.ranks)]
    gradients = gradient_of(model, list(named.values()), probe_loss, batches)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gradients, strict=True)}


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def design_coefficient(inner, norm_g_sq, norm_p_sq, gamma):
    """max(0, gamma |g||p| - <g,p>) / |p|^2, written out once more."""
    return max(0.0, gamma * (norm_g_sq * norm_p_sq) ** 0.5 - inner) / norm_p_sq


def train(recipe, model=None):
    """Train in this process.

    Returns:
        The model, and per step a dict with the coefficient and the inner products <g,p>, <g,g>, <p,p>.
    """
    model = build_model(recipe) if model is None else model
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(recipe, parameters)
    history = []
    for step in range(recipe.steps):
        micro = slice(step * recipe.accumulation, (step + 1) * recipe.accumulation)
        batches = [training_batches(recipe, rank)[micro] for rank in range(recipe.ranks)]
        protected = list(full_probe_gradient(model, recipe).values())
        for parameter, gradient in zip(parameters, gradient_of(model, parameters, training_loss, batches), strict=True):
            parameter.grad = None if gradient is None else gradient / recipe.accumulation
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        g, p = flat(grads), flat(protected)
        products = {"gp": float(g @ p), "gg": float(g @ g), "pp": float(p @ p)}
        coefficient = 0.0
        if recipe.gamma is not None:
            coefficient = design_coefficient(products["gp"], products["gg"], products["pp"], recipe.gamma)
            for parameter, direction in zip(parameters, protected, strict=True):
                if parameter.grad is not None:
                    parameter.grad += coefficient * direction
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"coefficient": coefficient, **products})
    return model, history


def weights(model):
    """Every parameter in float64 by name."""
    return {name: p.detach().double() for name, p in model.named_parameters()}


def relative_error(found, expected, start):
    """|found - expected| / |expected - start| over all parameters, each a dict name -> tensor or nested list."""

    def vector(named):
        return flat([torch.as_tensor(named[name], dtype=torch.float64) for name in sorted(expected)])

    assert set(found) == set(expected)
    return float((vector(found) - vector(expected)).norm() / (vector(expected) - vector(start)).norm())
