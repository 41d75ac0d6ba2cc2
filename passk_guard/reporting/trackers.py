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
from passk_guard.reporting.html.figures import BLUE, GREY, VERMILLION, angle_over_k, colour_limit, heat_map
from passk_guard.reporting.html.figures import Figure as PageFigure
from passk_guard.reporting.log_rows import PREFIX
from passk_guard.utils.text import Once, describe_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

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


_KERNEL, _CURVE = "Similarity kernel of the prompts", "Angle of pass@k to pass@1"
_SIDE = "prompt, easy to hard"


def kernel_figure(kernel: Tensor, title: str) -> Figure:
    """The kernel, from easy to hard, by matplotlib: vermillion below zero, blue above, grey where undefined."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes, limit = figure.subplots(), colour_limit(kernel)
    colours = LinearSegmentedColormap.from_list("signed", [VERMILLION, "white", BLUE]).with_extremes(bad=GREY)
    image = axes.imshow(kernel.detach().cpu().double().numpy(), colours, vmin=-limit, vmax=limit)
    axes.set(xlabel=_SIDE, ylabel=_SIDE, title=title)
    figure.colorbar(image, label="inner product of two prompts' gradients")
    return figure


def curve_figure(curve: ConflictCurve, k_star: int | None, title: str) -> Figure:
    """cos(grad J_k, grad J_1) over k by matplotlib, with band and k*; vermillion where a conflict is established."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes, ks, cosines = figure.subplots(), curve.k.tolist(), curve.cosine.tolist()
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    band = axes.fill_between(ks, curve.band_low.tolist(), curve.band_high.tolist(), color=BLUE, alpha=0.2, linewidth=0)
    band.set_label("band, all k together")
    axes.plot(ks, cosines, color=BLUE)
    axes.scatter(ks, cosines, c=[VERMILLION if e else "black" for e in curve.established.tolist()], zorder=3)
    axes.set(xlabel="k", ylabel="cosine", ylim=(-1.05, 1.05), title=title)
    if k_star is not None:
        axes.axvline(k_star, color=GREY, linestyle="--", label=f"k* = {k_star}")
    axes.legend(loc="upper right", fontsize="small")
    return figure


class Images:
    """Sends two pictures every few refreshes: to wandb and trackio as figures of plotly, to TensorBoard by matplotlib.

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
        return [name for name, tracker in trackers.items() if self._sent(name, tracker, estimate, probe, step)]

    def _sent(self, name: str, tracker: Any, estimate: ConflictEstimate, probe: ProbeGram | None, step: int) -> bool:
        as_plotly = name == "wandb" or hasattr(tracker, "Html")  # trackio shows figures since it has `Html`
        try:
            kernel = _easy_to_hard(estimate.kernel, probe)
            pictures = (_plotly if as_plotly else _pixels)(kernel, estimate, f"{{}}, step {step}")
        except ImportError as error:
            self._warn('pictures of the kernel need plotly and matplotlib: pip install "passk-guard[report]"', error)
            return False
        except Exception as error:
            self._warn("the pictures of the kernel could not be drawn", error)
            return False
        try:
            if name == "tensorboard":
                for key, picture in pictures.items():
                    tracker.add_image(key, picture, step, dataformats="HWC")
            else:  # the step as transformers logs it: a step argument would close the row it is still writing
                images = pictures if as_plotly else {key: tracker.Image(one) for key, one in pictures.items()}
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


def _easy_to_hard(kernel: Tensor, probe: ProbeGram | None) -> Tensor:
    """Rows and columns by falling pass rate, as in Fig. 2 of arXiv 2602.21189."""
    if probe is None:
        return kernel
    rates = probe.num_correct.double() / probe.num_samples.clamp(min=1)
    order = torch.argsort(rates, descending=True, stable=True).to(kernel.device)
    return kernel[order][:, order]


def _plotly(kernel: Tensor, estimate: ConflictEstimate, title: str) -> dict[str, Any]:
    """Figures of plotly by their names in a tracker."""
    import plotly.graph_objects as go

    names = [f"prompt {i + 1} of {len(kernel)}" for i in range(len(kernel))]
    told: dict[str, Any] = {"alt": "", "note": ""}
    found: dict[str, PageFigure] = {"kernel": heat_map(kernel, names, title=_KERNEL, side=_SIDE, **told)}
    if (curve := estimate.curve) is not None and curve.k.numel():
        bands = [(curve.band_low.tolist(), curve.band_high.tolist(), "band, all k together")]
        told |= {"threshold": estimate.threshold, "k_star": estimate.k_star, "established": curve.established.tolist()}
        found["k_curve"] = angle_over_k(curve.k.tolist(), curve.cosine.tolist(), bands, title=_CURVE, **told)
    return {
        PREFIX + key: go.Figure(one.data, one.layout).update_layout(
            title=title.format(one.title), margin={"t": 80}, template="plotly_white"
        )
        for key, one in found.items()
    }


def _pixels(kernel: Tensor, estimate: ConflictEstimate, title: str) -> dict[str, Any]:
    """[height, width, 3] uint8 NumPy arrays by their names in a tracker."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures = {"kernel": kernel_figure(kernel, title.format(_KERNEL))}
    if estimate.curve is not None and estimate.curve.k.numel():
        figures["k_curve"] = curve_figure(estimate.curve, estimate.k_star, title.format(_CURVE))
    pictures = {}
    for name, figure in figures.items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures[PREFIX + name] = numpy.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pictures
