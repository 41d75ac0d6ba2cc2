"""Peak memory of this process on Linux, from a mark on: what the kernel counted, whoever asked for it."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): writing 5 sets VmHWM to what is resident now


def resident(name: str = "VmRSS") -> int:
    """Bytes resident now, or at most since the last reset with "VmHWM"."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def peak_added(run: Callable[[], object]) -> int:
    """Bytes by which the peak during `run` exceeds what was resident before it.

    What an earlier call freed but the allocator kept would be used again without showing: it is handed back first.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident()
    try:
        _CLEAR.write_text(_RESET_PEAK)
        run()
        return resident("VmHWM") - before
    except OSError:  # not allowed in some containers: look every millisecond instead
        return _watched(run) - before


def _watched(run: Callable[[], object]) -> int:
    highest, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return highest[0]
