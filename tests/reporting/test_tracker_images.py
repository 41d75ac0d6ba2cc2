"""The kernel and the curve over k as pictures, and the trackers they go to."""

import logging
import sys
import types

import pytest
import torch

from passk_guard import ConflictEstimate, ProbeGram
from passk_guard.estimation.records import ConflictCurve
from passk_guard.reporting import Reporter
from passk_guard.reporting.tracker_images import (
    SIGN_WIDTH,
    Images,
    blank,
    curve_picture,
    draw_line,
    fill,
    kernel_picture,
    write,
)

VERMILLION, BLUE, WHITE = [213, 94, 0], [0, 114, 178], [255, 255, 255]
NAN = float("nan")


def curve(cosine, established=None):
    count = len(cosine)
    values = torch.tensor(cosine, dtype=torch.float64)
    ks = torch.arange(1, count + 1)
    return ConflictCurve(ks, values, values - 0.1, values + 0.1, torch.tensor(established or [False] * count))


def estimate(kernel=None, **fields):
    common = {"k": 2, "status": "clear", "reason": "", "confidence": 0.95, "threshold": 0.0}
    counts = {"num_prompts": 3, "num_informative": 3, "num_refreshes": 1}
    kernel = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) if kernel is None else kernel
    return ConflictEstimate(**common, **counts, kernel=kernel, curve=curve([1.0, -0.5]), k_star=1, **fields)


def test_cells_of_the_kernel_run_from_easy_to_hard():
    kernel = torch.tensor([[1.0, 1.0, -1.0], [1.0, 0.0, 1.0], [-1.0, 1.0, 1.0]])
    plain = kernel_picture(kernel)
    assert plain[60, 60].tolist() == BLUE
    assert plain[60, 300].tolist() == VERMILLION
    assert plain[180, 180].tolist() == WHITE, "no interference is no colour"
    sorted_ = kernel_picture(kernel, torch.tensor([0.2, 0.9, 0.5]))  # prompts 1, 2, 0
    assert sorted_[60, 60].tolist() == WHITE
    assert sorted_[180, 300].tolist() == VERMILLION


@pytest.mark.parametrize("count", [1, 2, 64, 1000])
def test_pictures_of_kernels_of_all_sizes(count):
    picture = kernel_picture(torch.randn(count, count))
    assert picture.dtype == torch.uint8
    assert 300 <= picture.shape[0] <= 600


def test_the_curve_passes_through_its_points():
    drawn = curve_picture(curve([1.0, 0.0, -1.0], [False, False, True]), 2)
    rows, columns = (24, 143, 262), (58, 244, 430)
    assert drawn[rows[0], columns[0]].tolist() == [30, 30, 30]
    assert drawn[rows[2], columns[2]].tolist() == VERMILLION, "established"
    assert drawn[(rows[0] + rows[1]) // 2, (columns[0] + columns[1]) // 2].tolist() == BLUE
    assert drawn[250, columns[1]].tolist() == [130, 130, 130], "k*"
    gone = curve_picture(curve([NAN, NAN]), None)
    assert not (gone == torch.tensor(BLUE)).all(-1).any()


def test_the_canvas_leaves_out_what_lies_outside():
    canvas = blank(5, 5)
    fill(canvas, -3, 0, -3, 0, (1, 2, 3))
    fill(canvas, 7, 9, 7, 9, (1, 2, 3))
    fill(canvas, -5, -2, 0, 4, (9, 9, 9))
    assert (canvas == torch.tensor([1, 2, 3])).all(-1).nonzero().tolist() == [[0, 0]]
    assert not (canvas == 9).any()
    draw_line(canvas, (-2, -2), (6, 6), (0, 0, 0), width=1)
    assert (canvas == 0).all(-1).nonzero().tolist() == [[i, i] for i in range(5)]


def test_signs_stay_in_their_place():
    canvas = blank(10, 3 * SIGN_WIDTH)
    write(canvas, "1ü1", 0, 0)
    dark = (canvas[..., 0] < 255).any(0)
    assert dark[:SIGN_WIDTH].any()
    assert not dark[SIGN_WIDTH : 2 * SIGN_WIDTH].any(), "an unknown sign is a gap"
    assert dark[2 * SIGN_WIDTH :].any()


class Writer:
    def __init__(self):
        self.taken = []

    def add_image(self, name, picture, step, dataformats):
        self.taken.append((name, step, tuple(picture.shape), dataformats))


def trainer(writer=None, report_to=()):
    handler = types.SimpleNamespace(callbacks=[object(), types.SimpleNamespace(tb_writer=writer)])
    args = types.SimpleNamespace(report_to=list(report_to))
    return types.SimpleNamespace(callback_handler=handler, args=args)


def test_every_few_refreshes_from_the_first_on():
    writer = Writer()
    images = Images(trainer(writer), every=3)
    sent = [bool(images.refresh(step, estimate())) for step in range(7)]
    assert sent == [True, False, False, True, False, False, True]
    assert [(name, step) for name, step, *_ in writer.taken[:3]] == [
        ("passk_guard/kernel", 0),
        ("passk_guard/k_curve", 0),
        ("passk_guard/kernel", 3),
    ]
    assert {formats for *_, formats in writer.taken} == {"HWC"}


def test_nothing_is_drawn_where_nobody_looks(monkeypatch):
    def fails(*_):
        raise AssertionError("drawn for nobody")

    monkeypatch.setattr("passk_guard.reporting.tracker_images.kernel_picture", fails)
    assert Images(trainer(), every=1).refresh(0, estimate()) == []
    assert Images(trainer(Writer()), every=0).refresh(0, estimate()) == []
    assert Images(trainer(Writer()), every=1).refresh(0, estimate(torch.empty(0, 0))) == []


def module(calls, **more):
    return types.SimpleNamespace(Image=lambda array: array, log=calls.append, **more)


def test_trackers_that_the_run_reports_to(monkeypatch):
    wandb, trackio = [], []
    monkeypatch.setitem(sys.modules, "wandb", module(wandb, run=object()))
    monkeypatch.setitem(sys.modules, "trackio", module(trackio))
    assert Images(trainer(report_to=["wandb"]), every=1).refresh(5, estimate()) == ["wandb"]
    assert trackio == []
    assert set(wandb[0]) == {"passk_guard/kernel", "passk_guard/k_curve", "train/global_step"}
    assert wandb[0]["train/global_step"] == 5
    assert wandb[0]["passk_guard/kernel"].dtype.name == "uint8"
    assert Images(trainer(report_to=["trackio"]), every=1).refresh(5, estimate()) == ["trackio"]
    monkeypatch.setitem(sys.modules, "wandb", module(wandb, run=None))
    assert Images(trainer(report_to=["wandb"]), every=1).refresh(5, estimate()) == [], "a run that has not begun"


def test_failures_are_said_once_and_stop_nothing(monkeypatch, caplog):
    class Full:
        def add_image(self, *_, **__):
            raise OSError("disk full")

    calls = []
    monkeypatch.setitem(sys.modules, "trackio", module(calls))
    images = Images(trainer(Full(), ["trackio"]), every=1)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        assert images.refresh(0, estimate()) == ["trackio"]
        assert images.refresh(1, estimate()) == ["trackio"]
        wrong = ProbeGram(torch.zeros(2, 2), torch.ones(5), torch.ones(5))
        assert images.refresh(2, estimate(), wrong) == []
    assert caplog.text.count("tensorboard did not take the pictures of the kernel: OSError: disk full") == 1
    assert caplog.text.count("could not be drawn") == 1


def test_random_states_stay_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Images(trainer(Writer()), every=1).refresh(0, estimate(torch.eye(50)))
    assert torch.equal(torch.get_rng_state(), before)


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
