"""Without any extra: a plain Trainer is watched, where no library of an extra can be imported."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WATCH = """
import sys
sys.modules |= dict.fromkeys({extras!r})
from passk_guard import watch
from tests.helpers.tiny import digit_reward, probe_rows, tiny_lm_trainer

trainer = tiny_lm_trainer(sys.argv[1])
settings = dict(k=4, num_samples=8, probe_prompts=12, refresh_steps=2, sketch_dim=512, probe_max_new_tokens=4)
guard = watch(trainer, probe_rows(), digit_reward, **settings)
trainer.train()
print(guard.memory.account.refreshes, guard.memory.failures)
"""


def extras():
    """Import names of what the extras ask for, and of what they bring along; not of what the package itself needs."""
    text = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'"([a-z-]+)[>=\[]', text.split("[project.optional-dependencies]")[1].split("]\ntest = ")[0])
    others = {name.replace("-", "_") for name in names} - {"rich", "passk_guard"}  # typer brings rich
    return sorted(others | {"peft", "pandas", "pyarrow", "PIL"})


def test_a_plain_trainer_is_watched_without_any_extra(tmp_path):
    assert {"trl", "datasets", "deepspeed", "matplotlib"} <= set(extras())
    command = [sys.executable, "-c", WATCH.format(extras=extras()), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["2", "0"]
