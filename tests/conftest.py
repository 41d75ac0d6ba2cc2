"""Settings of the whole test run: nothing is downloaded or reported anywhere, and random inputs are the same each time.

A change passes or fails by what it changes. `make fuzz` looks for new cases, twenty times as many.
"""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("few", settings.get_profile("repeatable"), max_examples=20)
settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("repeatable")
