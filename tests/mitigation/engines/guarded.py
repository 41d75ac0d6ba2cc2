"""The run of `oracle.py` through a real `transformers.Trainer` and a gradient engine."""

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from passk_guard.mitigation.engines.choose import choose_engine
from tests.mitigation.engines import oracle


class FixedTrainer(Trainer):
    """Trains on this rank's batches of a recipe, in order, with the oracle's loss and optimizer."""

    def __init__(self, recipe, rank, folder, model=None, **settings):
        self.recipe, self.rank = recipe, rank
        arguments = TrainingArguments(
            output_dir=str(folder),
            **{
                "use_cpu": True,
                "report_to": [],
                "save_strategy": "no",
                "disable_tqdm": True,
                "max_steps": recipe.steps,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": recipe.accumulation,
                "learning_rate": recipe.learning_rate,
                "weight_decay": recipe.weight_decay,
                "max_grad_norm": recipe.max_norm,
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "seed": 0,
            }
            | settings,
        )
        model = oracle.build_model(recipe) if model is None else model
        super().__init__(model=model, args=arguments)
        self.model_accepts_loss_kwargs = False  # divide by the accumulation steps, as the oracle does

    def get_train_dataloader(self):
        return oracle.training_batches(self.recipe, self.rank)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return oracle.training_loss(model, inputs)

    def create_optimizer(self, model=None):
        self.optimizer = oracle.make_optimizer(self.recipe, [p for p in self.model.parameters() if p.requires_grad])
        return self.optimizer


class Projecting(TrainerCallback):
    """Harvests the probe gradient at each step boundary and edits the gradient before each step.

    Args:
        coefficient: applied as it is; None for the formula with the recipe's gamma.
        batches, loss: of the probe.
        edit: False only measures.
        dtype: of the probe gradient.
    """

    def __init__(self, trainer, batches, loss=oracle.probe_loss, gamma=0.2, coefficient=None, edit=True, dtype=None):
        self.trainer, self.batches, self.loss, self.edit = trainer, batches, loss, edit
        self.gamma, self.coefficient, self.dtype = gamma, coefficient, dtype
        self.history, self.engine = [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.engine = choose_engine(self.trainer)
        self.engine.install(self.before_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.protected = self.engine.probe_gradient(self.batches, self.loss, self.dtype)

    def before_step(self):
        g, p = self.engine.gradient(), self.protected
        gp, gg, pp = self.engine.inner_products([(g, p), (g, g), (p, p)])
        coefficient = self.coefficient
        if coefficient is None:
            coefficient = oracle.design_coefficient(gp, gg, pp, self.gamma)
        if self.edit:
            self.engine.add_(p, coefficient)
        self.history.append({"coefficient": coefficient, "gp": gp, "gg": gg, "pp": pp})

    def on_train_end(self, args, state, control, **kwargs):
        self.engine.remove()


def train_guarded(
    recipe,
    rank,
    folder,
    *,
    model=None,
    edit=True,
    loss=oracle.probe_loss,
    projecting=Projecting,
    bucket_view=False,
    **settings,
):
    """Train a recipe under the engine that fits; gamma None trains without any engine.

    Returns:
        The trainer, and the callback (None without an engine).
    """
    trainer = FixedTrainer(recipe, rank, folder, model, **settings)
    if bucket_view:
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    callback = None
    if recipe.gamma is not None:
        batches, dtype = oracle.probe_batches(recipe, rank), getattr(torch, recipe.dtype)
        callback = projecting(trainer, batches, loss, gamma=recipe.gamma, edit=edit, dtype=dtype)
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback
