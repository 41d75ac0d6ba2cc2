"""Alerts and pictures, and the trackers they go to."""

import base64
import logging
import sys
import types

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from matplotlib.colors import to_hex

from passk_guard import ConflictEstimate, ProbeGram
from passk_guard.estimation.records import ConflictCurve
from passk_guard.reporting import Reporter
from passk_guard.reporting.trackers import Images, curve_figure, kernel_figure, send_alert, show_settings

VERMILLION, BLUE, NAN = "#d55e00", "#0072b2", float("nan")


def curve(cosine, established=None):
    values = torch.tensor(cosine, dtype=torch.float64)
    ks = torch.arange(1, len(cosine) + 1)
    found = torch.tensor(established or [False] * len(cosine))
    return ConflictCurve(ks, values, values - 0.1, values + 0.1, found, values - 0.2, values + 0.2)


def estimate(kernel=None, **fields):
    common = {"k": 2, "status": "clear", "reason": "", "confidence": 0.95, "threshold": 0.0}
    counts = {"num_prompts": 3, "num_informative": 3, "num_refreshes": 1}
    kernel = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) if kernel is None else kernel
    return ConflictEstimate(**common, **counts, kernel=kernel, curve=curve([1.0, -0.5]), k_star=1, **fields)


def test_the_kernel_and_the_curve_by_matplotlib():
    kernel = torch.tensor([[1.0, 2.0, -3.0], [2.0, 0.0, 4.0], [-3.0, 4.0, 1.0]])
    axes = kernel_figure(kernel, "Kernel, step 5").axes[0]
    (image,) = axes.images
    assert image.get_array().tolist() == kernel.tolist()
    assert image.get_clim() == (-4.0, 4.0)
    assert [to_hex(image.cmap(share)) for share in (0.0, 1.0)] == [VERMILLION, BLUE]
    assert min(image.cmap(0.5)) > 0.99, "no interference is no colour"
    assert axes.get_title() == "Kernel, step 5"
    assert axes.get_xlabel() == axes.get_ylabel() == "prompt, easy to hard"
    axes = curve_figure(curve([1.0, 0.0, -1.0], [False, False, True]), 2, "t").axes[0]
    _, line, k_star = axes.lines
    assert line.get_xydata().tolist() == [[1, 1], [2, 0], [3, -1]]
    assert list(k_star.get_xdata()) == [2, 2]
    colours = [to_hex(colour) for colour in axes.collections[1].get_facecolors()]
    assert colours == ["#000000", "#000000", VERMILLION], "established"
    gone = curve_figure(curve([NAN, NAN]), None, "t").axes[0]
    assert np.isnan(gone.lines[1].get_ydata()).all()
    assert len(gone.lines) == 2, "no k*"


class Writer:
    def __init__(self):
        self.taken = []

    def add_image(self, name, picture, step, dataformats):
        assert picture.dtype == np.uint8
        self.taken.append((name, step, picture.shape, dataformats))


def trainer(writer=None, report_to=()):
    handler = types.SimpleNamespace(callbacks=[object(), types.SimpleNamespace(tb_writer=writer)])
    args = types.SimpleNamespace(report_to=list(report_to))
    return types.SimpleNamespace(callback_handler=handler, args=args)


@pytest.mark.parametrize("count", [1, 1000])
def test_every_few_refreshes_from_the_first_on_and_for_kernels_of_all_sizes(count):
    writer = Writer()
    images = Images(trainer(writer), every=3)
    before = torch.get_rng_state()
    kernel = torch.ones(count, count)
    assert [bool(images.refresh(step, estimate(kernel))) for step in range(5)] == [True, False, False, True, False]
    shape = (400, 500, 3)
    kernel, k_curve = "passk_guard/kernel", "passk_guard/k_curve"
    assert writer.taken == [(name, step, shape, "HWC") for step in (0, 3) for name in (kernel, k_curve)]
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_drawn_without_a_tracker(monkeypatch):
    def fails(*_):
        raise AssertionError("drawn for nobody")

    monkeypatch.setattr("passk_guard.reporting.trackers.kernel_figure", fails)
    monkeypatch.setattr("passk_guard.reporting.trackers.heat_map", fails)
    assert Images(trainer(), every=1).refresh(0, estimate()) == []
    assert Images(trainer(Writer()), every=0).refresh(0, estimate()) == []
    assert Images(trainer(Writer()), every=1).refresh(0, estimate(torch.empty(0, 0))) == []


def module(calls, **more):
    """A tracker that takes what it is given."""
    level = types.SimpleNamespace(INFO="info", WARN="warn", ERROR="error")
    common = {"Image": lambda array: array, "log": calls.append, "alert": lambda **kw: calls.append(kw)}
    return types.SimpleNamespace(**common | more, AlertLevel=level)


def test_alerts_go_where_the_run_reports(monkeypatch):
    wandb, trackio = [], []
    monkeypatch.setitem(sys.modules, "wandb", module(wandb, run=object()))
    monkeypatch.setitem(sys.modules, "trackio", module(trackio))
    assert send_alert("t", "x", []) == send_alert("t", "x", ["tensorboard"]) == []
    assert send_alert("t", "x", ["wandb", "tensorboard"]) == ["wandb"]
    assert wandb == [{"title": "t", "text": "x", "level": "warn"}]
    assert trackio == []
    assert send_alert("t", "x", ["wandb", "trackio"], "ERROR") == ["wandb", "trackio"]
    assert trackio == [{"title": "t", "text": "x", "level": "error"}]


def test_the_config_of_a_run_has_the_settings(monkeypatch, caplog):
    config = types.SimpleNamespace(taken=[])
    config.update = lambda settings, **_: config.taken.append(settings)
    monkeypatch.setitem(sys.modules, "wandb", module([], run=object(), config=config))
    monkeypatch.setitem(sys.modules, "trackio", module([], config=object()))
    texts = types.SimpleNamespace(add_text=lambda name, text: config.taken.append((name, text)))
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        show_settings(trainer(texts, ["wandb", "trackio"]), {"k": 8})
    assert config.taken == [{"passk_guard": {"k": 8}}, ("passk_guard/settings", '{\n  "k": 8\n}')]
    assert "trackio did not take the settings: AttributeError" in caplog.text


def test_alerts_that_fail_are_logged(monkeypatch, caplog):
    def down(**_):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "wandb", module([], alert=down, run=1))
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        assert send_alert("t", "x", ["wandb"]) == []
    assert "ConnectionError: offline" in caplog.text
    monkeypatch.setitem(sys.modules, "wandb", module([], run=None))
    assert send_alert("t", "x", ["wandb"]) == [], "a run that has not begun"


def test_prompts_run_from_easy_to_hard(monkeypatch):
    wandb = []
    monkeypatch.setitem(sys.modules, "wandb", module(wandb, run=object()))
    kernel = torch.tensor([[1.0, 2.0, -3.0], [2.0, 0.0, 4.0], [-3.0, 4.0, 1.0]])
    probe = ProbeGram(torch.zeros(6, 6), torch.tensor([10, 10, 10]), torch.tensor([2, 9, 5]))  # prompts 1, 2, 0
    Images(trainer(report_to=["wandb"]), every=1).refresh(5, estimate(kernel), probe)
    cells = wandb[0]["passk_guard/kernel"].to_plotly_json()["data"][0]["z"]
    values = np.frombuffer(base64.b64decode(cells["bdata"]), "f4").reshape(3, 3)
    assert values.tolist() == kernel[[1, 2, 0]][:, [1, 2, 0]].tolist()


def test_trackers_that_the_run_reports_to(monkeypatch):
    wandb, trackio = [], []
    monkeypatch.setitem(sys.modules, "wandb", module(wandb, run=object()))
    monkeypatch.setitem(sys.modules, "trackio", module(trackio))
    assert Images(trainer(report_to=["wandb"]), every=1).refresh(5, estimate()) == ["wandb"]
    assert trackio == []
    assert set(wandb[0]) == {"passk_guard/kernel", "passk_guard/k_curve", "train/global_step"}
    assert wandb[0]["train/global_step"] == 5
    kernel, k_curve = wandb[0]["passk_guard/kernel"], wandb[0]["passk_guard/k_curve"]
    assert isinstance(kernel, go.Figure)
    assert kernel.layout.title.text == "Similarity kernel of the prompts, step 5"
    assert kernel.data[0].y == ("1: prompt 1 of 2", "2: prompt 2 of 2")
    assert k_curve.layout.title.text == "Angle of pass@k to pass@1, step 5"
    assert (k_curve.layout.xaxis.title.text, k_curve.layout.yaxis.title.text) == ("k", "cosine")
    assert Images(trainer(report_to=["trackio"]), every=1).refresh(5, estimate()) == ["trackio"]
    assert trackio[0]["passk_guard/kernel"].shape == (400, 500, 3), "an earlier trackio takes images alone"
    monkeypatch.setitem(sys.modules, "trackio", module(trackio, Html=object))
    Images(trainer(report_to=["trackio"]), every=1).refresh(10, estimate())
    assert isinstance(trackio[1]["passk_guard/kernel"], go.Figure)
    monkeypatch.setitem(sys.modules, "wandb", module(wandb, run=None))
    assert Images(trainer(report_to=["wandb"]), every=1).refresh(5, estimate()) == [], "a run that has not begun"


def test_failures_are_logged_once_and_stop_nothing(monkeypatch, caplog):
    class Full:
        def add_image(self, *_, **__):
            raise OSError("disk full")

    monkeypatch.setitem(sys.modules, "trackio", module([]))
    images = Images(trainer(Full(), ["trackio"]), every=1)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        assert images.refresh(0, estimate()) == ["trackio"]
        assert images.refresh(1, estimate()) == ["trackio"]
        wrong = ProbeGram(torch.zeros(2, 2), torch.ones(5), torch.ones(5))
        assert images.refresh(2, estimate(), wrong) == []
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert images.refresh(3, estimate()) == images.refresh(4, estimate()) == []
    assert caplog.text.count("tensorboard did not take the pictures of the kernel: OSError: disk full") == 1
    assert caplog.text.count("could not be drawn") == 1
    assert caplog.text.count('need plotly and matplotlib: pip install "passk-guard[report]"') == 1


def test_pictures_reach_tensorboard_through_the_reporter(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tb")) as writer:
        real = trainer(writer)
        real.args.output_dir = str(tmp_path)
        real.state = types.SimpleNamespace(is_world_process_zero=True, global_step=0)
        real.log = lambda logs: None
        reporter = Reporter(real, held_out=True, image_refreshes=2, settings={"k": 2})
        reporter.open()
        probe = ProbeGram(torch.zeros(4, 4), torch.tensor([4, 4]), torch.tensor([1, 3]))
        for step in range(3):
            reporter.refresh(step, estimate(), "clear", {}, remark=None, probe=probe)
        real.state.is_world_process_zero = False
        for step in (4, 5):  # on another rank nothing is sent
            reporter.refresh(step, estimate(), "clear", {}, remark=None, probe=probe)
    read = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert sorted(read.Tags()["images"]) == ["passk_guard/k_curve", "passk_guard/kernel"]
    pictures = read.Images("passk_guard/kernel")
    assert [picture.step for picture in pictures] == [0, 2]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")
    assert '"event": "start", "step": 0, "settings": {"k": 2}' in (tmp_path / "passk_guard.jsonl").read_text()
