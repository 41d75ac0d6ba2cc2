"""docs/mistakes.md: each plausible mistake and what the guard says of it, as a run of this file prints it.

python -m tests.project.test_mistakes    # writes the table anew
"""

import logging
import re
import tempfile
from pathlib import Path

import pytest

import passk_guard
from passk_guard import GuardError, PassKGuardCallback, PassKObjective
from tests.helpers.tiny import (
    digit_reward,
    probe_rows,
    tiny_chat_rows,
    tiny_grpo_trainer,
    tiny_lm_trainer,
    tiny_model,
    tiny_rows,
)

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
SMALL = {"k": 4, "num_samples": 8, "probe_prompts": 6, "sketch_dim": 512, "probe_max_new_tokens": 4}


def accuracy(completions, **_):
    return [0.9 * found + 0.1 * (i % 8 == 0) for i, found in enumerate(digit_reward(completions))]


def watch(trainer, probe=None, correct=digit_reward, **settings):
    return passk_guard.watch(trainer, probe=probe or probe_rows(), correct=correct, **{**SMALL, **settings})


def chats(count=40):
    return [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in probe_rows(count)]


def grpo(folder, **args):
    return tiny_grpo_trainer(folder, **args)


def chat_trainer(folder):
    from datasets import Dataset

    return grpo(folder, train_dataset=Dataset.from_list(tiny_chat_rows(32)))


def sft(folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.helpers.tiny import tiny_tokenizer

    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to=[], max_length=32)
    rows = Dataset.from_list([{"text": row["prompt"]} for row in tiny_rows(8)])
    return SFTTrainer(tiny_model(), args=args, train_dataset=rows, processing_class=tiny_tokenizer())


def with_own_generation_config(folder):
    model = tiny_model()
    model.generation_config.no_repeat_ngram_size = 3
    return grpo(folder, model=model)


def one_step(trainer, **settings):
    watch(trainer, **settings)
    trainer.train()


def without_a_trainer(folder):
    trainer = tiny_lm_trainer(folder)
    trainer.add_callback(PassKGuardCallback(probe=probe_rows(), correct=digit_reward))
    trainer.train()


def other_k(folder):
    trainer = grpo(folder, scale_rewards="none", loss_type="dr_grpo", max_steps=1)
    watch(trainer)
    with PassKObjective(trainer, k=2):
        trainer.train()


MISTAKES = {
    "The guard in `callbacks=[...]` without a trainer": without_a_trainer,
    "`refresh_step=10`": lambda folder: watch(tiny_lm_trainer(folder), refresh_step=10),
    "A column `question` in place of `prompt`": lambda folder: watch(
        tiny_lm_trainer(folder), [{"question": row["prompt"], "answer": "x"} for row in probe_rows()]
    ),
    "Chat messages in the probe, texts in training": lambda folder: watch(grpo(folder), chats()),
    "Texts in the probe, chat messages in training": lambda folder: watch(chat_trainer(folder)),
    "Training prompts in the probe, as the texts of its messages": lambda folder: watch(
        grpo(folder), tiny_chat_rows(5)
    ),
    "Training messages in the probe, as their texts": lambda folder: watch(chat_trainer(folder), tiny_rows(5)),
    "Rewards of 0.9 for a right answer": lambda folder: one_step(
        tiny_lm_trainer(folder, max_steps=1), correct=accuracy, instruments="angle"
    ),
    "An `SFTTrainer` whose context is shorter than the default completion": lambda folder: watch(
        sft(folder), probe_max_new_tokens=256
    ),
    '`generation_kwargs={"temperature": 0.7}`': lambda folder: watch(
        grpo(folder, generation_kwargs={"temperature": 0.7})
    ),
    '`generation_kwargs={"top_k": 20}`': lambda folder: watch(grpo(folder, generation_kwargs={"top_k": 20})),
    "A truncation in the model's own `generation_config`": lambda folder: watch(with_own_generation_config(folder)),
    "Structured outputs": lambda folder: watch(grpo(folder, vllm_structured_outputs_regex="[0-9]+")),
    "`mask_truncated_completions=True`": lambda folder: watch(grpo(folder, mask_truncated_completions=True)),
    "`num_samples` = k": lambda folder: watch(tiny_lm_trainer(folder), num_samples=4),
    "`num_generations` = k": lambda folder: PassKObjective(
        grpo(folder, scale_rewards="none", loss_type="dr_grpo"), k=4
    ),
    "Another k in the objective than in the guard": other_k,
}
ROUTINE = ("passk_guard watches", "first refresh", "UNDETERMINED", "passk_guard ends", "the whole run on a page")


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def message(name):
    """What the guard raises or warns of."""
    log, found = logging.getLogger("passk_guard"), Lines()
    log.addHandler(found)
    try:
        with tempfile.TemporaryDirectory() as folder:
            MISTAKES[name](folder)
    except GuardError as error:
        return f"GuardError: {error}"
    finally:
        log.removeHandler(found)
    lines = [line for line in found.lines if not any(words in line for words in ROUTINE)]
    assert len(lines) == 1, (name, lines)
    return lines[0]


def row(name):
    return f"| {name} | {message(name).replace('|', chr(92) + '|')} |"


@pytest.mark.parametrize("name", MISTAKES)
def test_the_page_has_what_the_guard_says(name):
    assert row(name) in PAGE.read_text().splitlines()


def test_the_page_has_no_other_mistake():
    assert re.findall(r"^\| (.+?) \| .+ \|$", PAGE.read_text(), flags=re.M)[1:] == list(MISTAKES)


if __name__ == "__main__":
    head = PAGE.read_text().partition("\n\n| ")[0] + "\n"
    table = ["| mistake | what the guard says |", "|---|---|", *map(row, MISTAKES)]
    PAGE.write_text("\n".join([head, *table, ""]))
