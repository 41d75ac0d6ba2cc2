"""Settings of the whole test run: nothing is downloaded or reported anywhere, and what is drawn is the same each time.

A change passes or fails by what it changes. `pytest --hypothesis-profile=default` looks for new cases.
"""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
