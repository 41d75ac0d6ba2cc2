"""Alerts, pictures and settings in the trackers of a run.

Trackers are found where the run has them, never imported or started here. One that fails is only logged.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from passk_guard.estimation.records import ConflictCurve, ConflictEstimate, ProbeGram
from passk_guard.reporting.html.heat_map import NEGATIVE, POSITIVE, UNDEFINED, colour_limit
from passk_guard.reporting.log_rows import PREFIX
from passk_guard.utils.text import Once, describe_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_BLUE, _VERMILLION, _GREY = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (POSITIVE, NEGATIVE, UNDEFINED))


Level = Literal["INFO", "WARN", "ERROR"]


def send_alert(title: str, text: str, trackers: Collection[str], level: Level = "WARN") -> list[str]:
    """Raise an alert in wandb and trackio where the run reports to them.

    Args:
        title: short, for a phone; text: the evidence and what to do.
        trackers: names in `TrainingArguments.report_to`.
        level: ERROR for damage that is done, WARN for what may follow, INFO for an end of either.

    Returns:
        Names of the trackers that took it.
    """
    reached = []
    for name in ("wandb", "trackio"):
        try:
            tracker = _running(name, trackers)
            if tracker is not None:
                tracker.alert(title=title, text=text, level=getattr(tracker.AlertLevel, level))
                reached.append(name)
        except Exception as error:
            logger.warning("passk_guard: %s did not take the alert: %s", name, describe_error(error))
    return reached


def show_settings(trainer: Any, settings: Mapping[str, Any]) -> None:
    """Put the guard's settings into the config of the run in wandb and trackio, and beside it in TensorBoard."""
    names = trainer.args.report_to or ()
    for name in ("wandb", "trackio"):
        try:
            config = getattr(_running(name, names), "config", None)
            if config is not None:
                config.update({"passk_guard": dict(settings)}, allow_val_change=True)
        except Exception as error:
            logger.warning("passk_guard: %s did not take the settings: %s", name, describe_error(error))
    writer = _tensorboard(trainer)
    if writer is not None:
        writer.add_text(PREFIX + "settings", json.dumps(settings, indent=2, default=str))


def _tensorboard(trainer: Any) -> Any:
    """The writer of transformers' TensorBoardCallback, which has one once the run has begun."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    return next((writer for c in callbacks if (writer := getattr(c, "tb_writer", None)) is not None), None)


def _running(name: str, trackers: Collection[str]) -> Any:
    module = sys.modules.get(name) if name in trackers else None
    return None if name == "wandb" and getattr(module, "run", None) is None else module


def kernel_figure(kernel: Tensor, rates: Tensor | None = None) -> Figure:
    """The kernel as a heat map: vermillion below zero, blue above, white at zero, grey where undefined.

    Args:
        kernel: [m, m], m >= 1.
        rates: [m] pass rates; rows and columns then run from easy to hard, as in Fig. 2 of arXiv 2602.21189.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    if rates is not None:
        order = torch.argsort(rates, descending=True, stable=True).to(kernel.device)
        kernel = kernel[order][:, order]
    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes, limit = figure.subplots(), colour_limit(kernel)
    colours = LinearSegmentedColormap.from_list("signed", [_VERMILLION, "white", _BLUE]).with_extremes(bad=_GREY)
    image = axes.imshow(kernel.detach().cpu().double().numpy(), colours, vmin=-limit, vmax=limit)
    axes.set(xlabel="prompt" if rates is None else "prompt, easy to hard")
    figure.colorbar(image)
    return figure


def curve_figure(curve: ConflictCurve, k_star: int | None) -> Figure:
    """cos(grad J_k, grad J_1) over k with its band, k*, and vermillion points where a conflict is established."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes, ks, cosines = figure.subplots(), curve.k.tolist(), curve.cosine.tolist()
    axes.axhline(0.0, color=_GREY, linewidth=0.8)
    axes.fill_between(ks, curve.band_low.tolist(), curve.band_high.tolist(), color=_BLUE, alpha=0.2, linewidth=0)
    axes.plot(ks, cosines, color=_BLUE)
    axes.scatter(ks, cosines, c=[_VERMILLION if e else "black" for e in curve.established.tolist()], zorder=3)
    axes.set(xlabel="k", ylabel="cos(pass@1, pass@k)", ylim=(-1.05, 1.05))
    if k_star is not None:
        axes.axvline(k_star, color=_GREY, linestyle="--")
        axes.set_title(f"k* = {k_star}")
    return figure


class Images:
    """Sends two pictures every few refreshes to TensorBoard, wandb and trackio, drawn by matplotlib.

    A tracker that fails is logged once, and called again the next time.

    Args:
        trainer: a transformers Trainer.
        every: refreshes between pictures, the first refresh with a kernel included; 0 sends none.
    """

    def __init__(self, trainer: Any, every: int) -> None:
        self._trainer, self._every = trainer, every
        self._seen = 0
        self._logged = Once()

    def refresh(self, step: int, estimate: ConflictEstimate, probe: ProbeGram | None = None) -> list[str]:
        """Count a refresh that has a kernel and, where it is due, send its pictures; return whom they reached.

        `probe` has the counts of the same prompts, for the order from easy to hard.
        """
        if not self._every or estimate.kernel.numel() == 0:
            return []
        self._seen += 1
        trackers = self._trackers()
        if (self._seen - 1) % self._every or not trackers:
            return []
        pictures: dict[str, Any] = {}
        try:
            pictures = _pictures(estimate, probe)
        except ImportError as error:
            self._warn("pictures of the kernel need matplotlib: pip install 'passk-guard[report]'", error)
        except Exception as error:
            self._warn("the pictures of the kernel could not be drawn", error)
        return [name for name, tracker in trackers.items() if pictures and self._sent(name, tracker, pictures, step)]

    def _sent(self, name: str, tracker: Any, pictures: dict[str, Any], step: int) -> bool:
        try:
            if name == "tensorboard":
                for title, picture in pictures.items():
                    tracker.add_image(title, picture, step, dataformats="HWC")
            else:  # the step as transformers logs it: a step argument would close the row it is still writing
                images = {title: tracker.Image(picture) for title, picture in pictures.items()}
                tracker.log({**images, "train/global_step": step})
        except Exception as error:
            self._warn(f"{name} did not take the pictures of the kernel", error)
            return False
        return True

    def _warn(self, what: str, error: Exception) -> None:
        if self._logged.new(what):
            logger.warning("passk_guard: %s: %s", what, describe_error(error))

    def _trackers(self) -> dict[str, Any]:
        names = self._trainer.args.report_to or ()
        found = {"tensorboard": _tensorboard(self._trainer)}
        found |= {name: _running(name, names) for name in ("wandb", "trackio")}
        return {name: tracker for name, tracker in found.items() if tracker is not None}


def _pictures(estimate: ConflictEstimate, probe: ProbeGram | None) -> dict[str, Any]:
    """[height, width, 3] uint8 NumPy arrays by their names in a tracker."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rates = None if probe is None else probe.num_correct.double() / probe.num_samples.clamp(min=1)
    figures = {PREFIX + "kernel": kernel_figure(estimate.kernel, rates)}
    if estimate.curve is not None and estimate.curve.k.numel():
        figures[PREFIX + "k_curve"] = curve_figure(estimate.curve, estimate.k_star)
    pictures = {}
    for name, figure in figures.items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures[name] = numpy.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pictures
