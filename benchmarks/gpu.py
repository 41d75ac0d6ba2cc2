"""What only a GPU can show, in one go of at most nine minutes: `make gpu`.

    python -m benchmarks.gpu [--out FILE] [--only tests sketch ...] [--minutes 9]
    python -m benchmarks.gpu --device cpu --tiny      # the same code anywhere, at sizes that show nothing

Nothing is downloaded. It needs torch with CUDA, transformers, accelerate and this checkout; whatever else `make
gpu-files` has put into `gpu_files/` is unpacked first, so that it can be imported (trl, datasets, deepspeed, a model's
file). Each result is one line of JSON, printed and written to FILE at once: a stop loses nothing. The sections:

    tests        `pytest -m gpu`: a line for each test
    sketch       sketching and rescoring over a forward and backward, memory, k_eff, at 0.5B, 1.5B and 7B shapes
    projection   training steps with and without projection, at the 1.5B shape
    example      a GRPO run unguarded and observed at overhead=0.10: seconds of a step, and what the guard found

Every section runs in a process of its own, with a limit in seconds. One that fails or runs out of its time leaves a
line with `error`, and the next one goes on. The exit status is 1 when a section has failed, a test among them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_files import FOLDER, unpack

Emit = Callable[[dict[str, Any]], None]
SECONDS = {"tests": 90, "sketch": 110, "projection": 40, "example": 300}
"""The limit of each section, in the order they run in; their sum is what nine minutes hold."""

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "deepspeed")


@dataclass(frozen=True)
class Asked:
    """The command line of a section: its device, whether at tiny sizes, and the seconds it has."""

    device: str
    tiny: bool
    seconds: float


def section(name: str, asked: Asked, emit: Emit) -> None:
    """Run one section in this process. Each result is handed to `emit` as soon as it is there."""
    from benchmarks import gpu_sections

    getattr(gpu_sections, name)(asked, emit)


def relay(command: Sequence[str], seconds: float, emit: Emit, env: dict[str, str] | None = None) -> str | None:
    """Run a command that prints lines of JSON, and pass each one on as it comes.

    At the end of its time the command and all that it has started are killed.

    Returns:
        Why it failed, with the end of its other output; None where it did not.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as other:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=other, text=True, env=env, start_new_session=True
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    emit(dict(json.loads(line)))
                except (ValueError, TypeError):
                    other.write(line)
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if late.is_set():
            return f"stopped after {seconds:.0f} s"
        if status == 0:
            return None
        other.seek(0)
        last = [line.rstrip() for line in other.read()[-4000:].splitlines() if line.strip()]
        return f"exit status {status}: " + " | ".join(last[-6:])[-800:]


def environment(device: str) -> dict[str, Any]:
    """The device and the versions of the stack; None for what is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    found: dict[str, Any] = {"device": "cpu", "python": sys.version.split()[0]}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found | {name: installed(name) for name in LIBRARIES}


def run(asked: argparse.Namespace, emit: Emit, environ: dict[str, str]) -> int:
    """All sections in turn; how many have failed."""
    deadline, failed = time.monotonic() + 60 * asked.minutes, 0
    for name in asked.only:
        began = time.monotonic()
        left = min(SECONDS[name], deadline - began)
        if left < 5:
            emit({"section": name, "error": "no time was left", "seconds": 0.0})
            failed += 1
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", asked.device, "--section", name]
        command += ["--seconds", f"{left:.0f}"] + ["--tiny"] * asked.tiny
        bad: list[str] = []

        def tagged(row: dict[str, Any], name: str = name, bad: list[str] = bad) -> None:
            if "error" in row:
                bad.append(str(row["error"]))
            emit({"section": name} | row)

        error = relay(command, left, tagged, environ)
        end: dict[str, Any] = {"section": name, "seconds": round(time.monotonic() - began, 1)}
        emit(end | ({"error": error} if error else {"done": True, "errors": len(bad)}))
        failed += bool(error or bad)
    return failed


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--out", type=Path, default=None, help="the lines are added to this file, too")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all sections together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--files", type=Path, default=FOLDER, help="what `make gpu-files` has prepared")
    parser.add_argument("--section", choices=list(SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    asked = arguments(argv)
    if asked.device != "cpu" and not torch.cuda.is_available():
        print("Expected a CUDA device; torch found none. Pass --device cpu --tiny to try the code.", file=sys.stderr)
        return 2
    if asked.section:
        # What libraries print goes to standard error; standard output has the results alone.
        lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        section(
            asked.section,
            Asked(asked.device, asked.tiny, asked.seconds),
            lambda row: print(json.dumps(row), file=lines, flush=True),
        )
        return 0

    def emit(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if asked.out is not None:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    site = unpack(asked.files)
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"  # ninja, for deepspeed
    if site is not None:
        sys.path.append(str(site))
        environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [environ.get("PYTHONPATH")]), str(site)])
    emit({"section": "environment"} | environment(asked.device))
    return int(run(asked, emit, environ) > 0)


if __name__ == "__main__":
    sys.exit(main())
