"""Files are written in the folder that was named, under fixed names, and through no link."""

import os
import stat

import pytest

from passk_guard.analysis.store import PromptRollouts, RolloutStore
from passk_guard.callback.state import FILE_NAME, Memory, load_memory, save_memory
from passk_guard.cli import main
from passk_guard.reporting import JOURNAL_NAME, Journal
from passk_guard.utils.files import write_whole
from tests.analysis.cases import synthetic
from tests.helpers.journals import write_run

NAMES = ["../../escaped", "/tmp/escaped", "a\x00b", "..", "con", "x/../../y", "~/escaped", "$(touch escaped)"]


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_no_name_becomes_a_path(name, tmp_path):
    inside = tmp_path / "a" / "b" / "out"
    synthetic(4, name=name, text=name + " {}").save(inside)
    assert everything(tmp_path) == ["a", "a/b", "a/b/out", "a/b/out/analysis.html", "a/b/out/analysis.json"]
    run = tmp_path / "run"
    journal = Journal(run / JOURNAL_NAME)
    journal.write("start", 0, settings={"out": name, name: name})
    journal.write(name, 0)
    journal.write("refresh", 0, verdict=name, reason=name)
    assert main(["report", str(run)]) == 0
    assert everything(run) == ["passk_guard.html", "passk_guard.jsonl"]


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("the user's own\nwithout an end")
    return path


def test_a_link_in_place_of_a_journal_is_not_written_through(victim, tmp_path, caplog):
    for name, target in (("link", victim), ("dangling", tmp_path / "nowhere")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / JOURNAL_NAME).symlink_to(target)
        Journal(folder / JOURNAL_NAME).write("refresh", 0)
        assert "it is a link" in caplog.text
    assert victim.read_text() == "the user's own\nwithout an end"
    assert not (tmp_path / "nowhere").exists()


def test_a_pipe_in_place_of_a_journal_does_not_stop_training(tmp_path, caplog):
    os.mkfifo(tmp_path / JOURNAL_NAME)
    Journal(tmp_path / JOURNAL_NAME).write("refresh", 0)
    assert "no regular file" in caplog.text
    assert main(["report", str(tmp_path)]) == 1


def test_a_folder_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "output").symlink_to(tmp_path / "real")
    Journal(tmp_path / "output" / JOURNAL_NAME).write("refresh", 0)
    assert (tmp_path / "real" / JOURNAL_NAME).is_file()


def test_links_in_place_of_whole_files_are_replaced(victim, tmp_path):
    write_run(tmp_path / "run")
    partial = f"page.html.{os.getpid()}.partial"
    for name in ("passk_guard.html", FILE_NAME, f"{FILE_NAME}.partial", partial, "page.html"):
        (tmp_path / "run" / name).symlink_to(victim)
    assert main(["report", str(tmp_path / "run"), "--force"]) == 0
    save_memory(Memory(step=5), tmp_path / "run")
    write_whole(tmp_path / "run" / "page.html", "text")
    assert load_memory(tmp_path / "run").step == 5
    assert victim.read_text() == "the user's own\nwithout an end"
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_symlink()]


def test_kept_completions_are_not_appended_through_a_link(victim, tmp_path):
    store = RolloutStore(tmp_path / "out")
    store.prepare({"seed": 1})
    (tmp_path / "out" / "rank0.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="it is a link"):
        store.append([PromptRollouts(0, [1], [[2]], ["a"])])
    assert victim.read_text() == "the user's own\nwithout an end"


def test_a_file_without_lines_is_not_cut(tmp_path, caplog):
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(b"\0" * (1 << 25))
    Journal(path).write("refresh", 0)
    assert path.stat().st_size == 1 << 25
    assert "none of the guard's" in caplog.text


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_of_the_users_mask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_run(tmp_path / "run")
        assert main(["report", str(tmp_path / "run")]) == 0
        save_memory(Memory(), tmp_path / "run")
        synthetic(4).save(tmp_path / "out")
    finally:
        os.umask(before)
    for path in (*(tmp_path / "run").iterdir(), *(tmp_path / "out").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
