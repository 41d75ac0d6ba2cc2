"""The kernel and the curve over k as images in the trackers of a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.reporting.metrics import PREFIX
from passk_guard.reporting.pictures import curve_picture, kernel_picture
from passk_guard.utils.text import describe_error

logger = logging.getLogger(__name__)


class Images:
    """Sends two pictures every few refreshes to TensorBoard, wandb and trackio, where the run reports to them.

    Trackers are found where the run has them, never imported or started here. One that fails is logged once, and
    asked again the next time.

    Args:
        trainer: a transformers Trainer.
        every: refreshes between pictures, the first refresh with a kernel included; 0 sends none.
    """

    def __init__(self, trainer: Any, every: int) -> None:
        self._trainer, self._every = trainer, every
        self._seen = 0
        self._failed: set[str] = set()

    def refresh(self, step: int, estimate: ConflictEstimate, probe: ProbeGram | None = None) -> list[str]:
        """Count a refresh and, where it is due, send its pictures.

        Args:
            step: they stand at.
            estimate: with its kernel; without one nothing is sent or counted.
            probe: counts of the same prompts, for the order from easy to hard.

        Returns:
            Names of the trackers that took them.
        """
        if not self._every or estimate.kernel.numel() == 0:
            return []
        self._seen += 1
        trackers = self._trackers()
        if (self._seen - 1) % self._every or not trackers:
            return []
        try:
            pictures = _pictures(estimate, probe)
        except Exception as error:
            self._tell("the pictures of the kernel could not be drawn", error)
            return []
        return [name for name, send in trackers.items() if self._sent(name, send, pictures, step)]

    def _sent(self, name: str, send: Callable[[dict[str, Tensor], int], None], pictures: Any, step: int) -> bool:
        try:
            send(pictures, step)
        except Exception as error:
            self._tell(f"{name} did not take the pictures of the kernel", error)
            return False
        return True

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._failed:
            self._failed.add(what)
            logger.warning("passk_guard: %s: %s", what, describe_error(error))

    def _trackers(self) -> dict[str, Callable[[dict[str, Tensor], int], None]]:
        names = self._trainer.args.report_to or ()
        found: dict[str, Callable[[dict[str, Tensor], int], None]] = {}
        writer = _tensorboard_writer(self._trainer)
        if writer is not None:
            found["tensorboard"] = lambda pictures, step: _to_tensorboard(writer, pictures, step)
        wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
        if "wandb" in names and getattr(wandb, "run", None) is not None:
            found["wandb"] = lambda pictures, step: _to_module(wandb, pictures, step)
        if "trackio" in names and trackio is not None:
            found["trackio"] = lambda pictures, step: _to_module(trackio, pictures, step)
        return found


def _pictures(estimate: ConflictEstimate, probe: ProbeGram | None) -> dict[str, Tensor]:
    rates = None if probe is None else probe.num_correct.double() / probe.num_samples.clamp(min=1)
    pictures = {PREFIX + "kernel": kernel_picture(estimate.kernel, rates)}
    if estimate.curve is not None and estimate.curve.k.numel():
        pictures[PREFIX + "k_curve"] = curve_picture(estimate.curve, estimate.k_star)
    return pictures


def _tensorboard_writer(trainer: Any) -> Any:
    """The writer of transformers' TensorBoardCallback; None before it has one and where the run has no TensorBoard."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    return next((w for c in callbacks if (w := getattr(c, "tb_writer", None)) is not None), None)


def _to_tensorboard(writer: Any, pictures: dict[str, Tensor], step: int) -> None:
    for name, picture in pictures.items():
        writer.add_image(name, picture, step, dataformats="HWC")


def _to_module(module: Any, pictures: dict[str, Tensor], step: int) -> None:
    # transformers logs the step as a number of its own too: a step of ours would close the row it is still writing.
    images = {name: module.Image(picture.numpy()) for name, picture in pictures.items()}
    module.log({**images, "train/global_step": step})
