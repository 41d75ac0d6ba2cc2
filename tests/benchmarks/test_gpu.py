"""`make gpu`: what fails or hangs leaves a line, and the next goes on; files are cut and joined; tiny sizes run."""

import json
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_files, gpu_sections

ROOT = Path(__file__).parents[2]
ROWS = "import json, time; print(json.dumps({'a': 1}), flush=True); print('no json', flush=True); "


@pytest.mark.parametrize(
    ("code", "seconds", "words"),
    [
        (ROWS, 60, None),
        (ROWS + "time.sleep(60)", 1, "stopped after 1 s"),
        (ROWS + "raise MemoryError('no room')", 60, "no room"),
        (ROWS + "import os; os.kill(os.getpid(), 9)", 60, "exit status -9"),
    ],
)
def test_results_come_as_they_are_made_and_a_failure_is_named(code, seconds, words):
    found, began = [], time.monotonic()
    error = gpu.relay([sys.executable, "-c", code], seconds, found.append)
    assert found == [{"a": 1}]
    assert (error is None) if words is None else words in error
    assert time.monotonic() - began < 30


def test_a_section_that_fails_does_not_stop_the_next(monkeypatch, capsys, tmp_path):
    def relay(command, seconds, emit, env):
        name = command[command.index("--section") + 1]
        emit({"value": name})
        if name == "projection":
            emit({"error": "one of several"})
        return "exit status 1" if name == "sketch" else None

    monkeypatch.setattr(gpu, "relay", relay)
    options = ["--device", "cpu", "--tiny", "--files", str(tmp_path / "none"), "--out", str(tmp_path / "gpu.jsonl")]
    assert gpu.main(options) == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "gpu.jsonl").read_text() == printed
    rows = [json.loads(line) for line in printed.splitlines()]
    assert rows[0]["section"] == "environment"
    ends = {row["section"]: row.get("error", row.get("errors")) for row in rows[1:] if "seconds" in row}
    assert ends == {"tests": 0, "sketch": "exit status 1", "projection": 1, "example": 0}
    assert gpu.main([*options, "--only", "tests", "--minutes", "0"]) == 1, "no time is a failure, and is said"
    assert "no time was left" in capsys.readouterr().out


def test_the_limits_add_up_to_nine_minutes():
    assert sum(gpu.SECONDS.values()) <= 540
    assert all(callable(getattr(gpu_sections, name)) for name in gpu.SECONDS)


@pytest.mark.parametrize("name", ["projection", "example"])
def test_a_section_runs_at_tiny_sizes(name):
    rows = []
    getattr(gpu_sections, name)(gpu.Asked("cpu", True, 60.0), rows.append)
    assert not any("error" in row for row in rows)
    last = json.loads(json.dumps(rows[-1]))
    if name == "projection":
        assert last["bytes"] == 4 * last["parameters"], "the protected direction is float32"
    else:
        assert [row["run"] for row in rows][0 :: len(rows) - 1] == ["unguarded", "observed"]
        assert last["steps_of_equal_reward"] == last["steps_compared"] > 0, "observing changes nothing"
        assert last["refreshes"] > 0 == last["failed_refreshes"]


def test_large_files_travel_in_pieces(tmp_path, capsys):
    folder, site = tmp_path / "files", tmp_path / "site"
    folder.mkdir()
    for name in ("made_up_module", "torch"):
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "x = 1\n" * 500)
    found = gpu_files.cut(folder, piece=1500)
    large = found["made_up_module-1.0-py3-none-any.whl"]["pieces"]
    assert len(large) > 1
    assert max(path.stat().st_size for path in folder.glob("*.whl.*")) <= 1500
    hidden = folder / large[0]
    content = hidden.read_bytes()
    hidden.unlink()
    gpu_files.unpack(folder, site)
    assert f"{large[0]} is not in" in capsys.readouterr().err
    hidden.write_bytes(content)
    assert gpu_files.unpack(folder, site) == site
    assert (site / "made_up_module.py").exists()
    assert not (site / "torch.py").exists(), "what the machine has stays"
    hidden.write_bytes(b"x" + content[1:])
    next(site.glob("made*.unpacked")).unlink()
    with pytest.raises(ValueError, match="SHA-256"):
        gpu_files.unpack(folder, site)
    assert gpu_files.unpack(tmp_path / "none") is None


def test_the_wheels_are_pinned_to_the_versions_that_are_tested():
    pins = gpu_files.pins(ROOT / "constraints.txt")
    loose = {name for name in (*gpu_files.WHEELS, *gpu_files.BUILT) if name.replace("_", "-").lower() not in pins}
    assert not loose


def test_tests_for_a_gpu_are_where_they_are_looked_for():
    marked = [
        path for path in (ROOT / "tests").rglob("*.py") if "mark.gpu" in path.read_text() or "CUDA]" in path.read_text()
    ]
    assert {path.name for path in marked} <= {"test_devices.py", "devices.py", "test_gpu.py"}
