"""GRPO on pass@8 where an answer takes a tool: two turns through TRL's own loop, observed by the guard and held by it.

    python -m examples.tool_use [--seed 0] [--quick] [--out runs/tool_use]

The interference task behind a lookup. A prompt is `[tag]S[name]` or `[tag]R[name]`, such as `gSqxz`. The digits of the
name are known to the tool `look` alone. The policy calls it with the name, reads four digits, and writes them sorted
(S) or reversed (R). Tags a..d want them in descending order, the other tags in ascending order. A step that teaches
"descending" costs the common prompts until the policy reads the tag, as in examples/interference.

A trajectory, with `.` under what the policy sampled and `-` under what the tool and the template put there:

    gSqxz>look(name=qxz)<eos>[5301]>0135<eos>
          .............. ... -------.... ...

The warm start is supervised on written trajectories: it calls the tool and sorts ascending whatever the tag. Two runs
start from it: in `observe` the guard changes nothing, in `hold` it keeps pass@1 at its level. pass@1 and pass@8 are
exact, since one trajectory is right on a prompt: p(x) is the product of the probabilities of its sampled tokens.

Left out: more than one call, tools that fail, an environment with a state. docs/tools.md says what holds for those.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import sys
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOTrainer

import passk_guard
from examples.interference.exact import pass_at_k
from examples.interference.model import make_model
from examples.interference.task import DIGITS, KINDS, MIXTURE, OPS, SPLITS, TAGS, another_order, right_answer
from examples.interference.train import make_config
from passk_guard.probe.samplers import TRLSampler

K, LETTERS = 8, "qrstuvwxyz"
CALL, LENGTH = "look(name=", 18  # of a completion: call 6, result 7, answer 5

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% elif m.role == 'tool' %}[{{ m.content }}]"
    "{% else %}{% for call in m.tool_calls or [] %}{{ call.function.name }}("
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}{% endfor %}){% endfor %}"
    "{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
"""How TRL writes a conversation down. Each turn adds to what was there, which its tool loop asks for."""

PARSER = {
    "defaults": {"role": "assistant"},
    "start_anchor": ">",
    "fields": {
        "tool_calls": {
            "open_pattern": r"(?P<name>look)\(name=",
            "close_pattern": r"\)",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": {"name": "{content}"}}},
        },
        "content": {"close_pattern": r"<eos>", "content": "text"},
    },
}
"""How TRL reads a call in what the policy wrote (`response_template` of transformers)."""


def look(name: str) -> str:
    """The four digits that are kept under a name.

    Args:
        name: three letters.
    """
    if len(name) != 3 or set(name) - set(LETTERS):
        raise ValueError("no such name")
    return "".join(random.Random(f"store/{name}").sample(DIGITS, 4))


def correct(completions: list[Any], name: list[str], answer: list[str], **_: object) -> list[float]:
    """1.0 for the one call of the right name, its result, and the exact answer; 0.0 for anything else."""
    return [float(turns == messages(n, look(n), a)) for turns, n, a in zip(completions, name, answer, strict=True)]


def messages(name: str, digits: str, answer: str) -> list[dict[str, Any]]:
    """The turns of a right trajectory, as TRL keeps them."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"name": name}}}
    return [
        {"role": "assistant", "tool_calls": [call], "content": ""},
        {"role": "tool", "name": "look", "content": digits},
        {"role": "assistant", "content": answer},
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, and one for the beginning of a call."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {t: i for i, t in enumerate([*special, CALL, *dict.fromkeys(TAGS + OPS + DIGITS + LETTERS), *")[]>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"look\(name=|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", chat_template=TEMPLATE, **named)
    tokenizer.response_template = PARSER
    return tokenizer


def make_prompts(split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Distinct rows of `prompt`, `name`, `answer`, `kind`, in the shares of `MIXTURE`; splits share no name."""
    every = ["".join(letters) for letters in product(LETTERS, repeat=3)]
    names = [n for n in every if hashlib.sha256(n.encode()).digest()[0] % 10 in SPLITS[split]]
    rows = []
    for kind, share in MIXTURE.items():
        op, tags = KINDS[kind]
        pairs = list(product(tags, names))
        for tag, name in random.Random(f"{split}/{kind}/{seed}").sample(pairs, round(share * size)):
            prompt = [{"role": "user", "content": f"{tag}{op}{name}"}]
            rows.append({"prompt": prompt, "name": name, "answer": right_answer(kind, look(name)), "kind": kind})
    random.Random(f"{split}/order/{seed}").shuffle(rows)
    return rows


def written(rng: random.Random) -> tuple[str, str, str, str]:
    """Prompt, name, digits and answer of a trajectory of the warm start: as examples/interference, digits at random."""
    name, digits = "".join(rng.choices(LETTERS, k=3)), "".join(rng.sample(DIGITS, 4))
    u, op = rng.random(), "S" if rng.random() < 0.7 else "R"
    if op == "R":
        answer = digits[::-1] if u < 0.1 else digits
    elif u < 0.93:
        answer = right_answer("easy" if u < 0.85 else "hard", digits)
    else:
        answer = another_order(digits, rng)
    return f"{rng.choice(TAGS)}{op}{name}", name, digits, answer


def encode(tokenizer: Any, trajectories: list[tuple[str, str, str, str]]) -> tuple[Tensor, Tensor]:
    """Tokens [B, 24] of prompt and completion, and which of them the policy samples."""
    before, call, result, after = (
        tokenizer(texts)["input_ids"]
        for texts in zip(
            *((f"{prompt}>", f"{CALL}{n})", f"[{digits}]>", answer) for prompt, n, digits, answer in trajectories),
            strict=True,
        )
    )
    eos = [tokenizer.eos_token_id]
    ids = [p + c + eos + r + a + eos for p, c, r, a in zip(before, call, result, after, strict=True)]
    mask = [0] * len(before[0]) + [1] * (len(call[0]) + 1) + [0] * len(result[0]) + [1] * (len(after[0]) + 1)
    return torch.tensor(ids), torch.tensor(mask).expand(len(ids), -1)


def log_probs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """log p of each trajectory [B]: the sum over the tokens that the policy samples."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (chosen * mask[:, 1:]).sum(1)


def warm_start(cache: Path, seed: int, steps: int) -> Path:
    """The folder of the policy that RL begins with; trained on the first call."""
    target = cache / f"seed{seed}-{steps}"
    if target.exists():
        return target
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    model = make_model(tokenizer, seed, positions=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        loss = -log_probs(model, *encode(tokenizer, [written(rng) for _ in range(128)])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    partial.rename(target)
    return target


class ExactRates(TrainerCallback):
    """Exact pass@1 and pass@k on rows, at the start and every few steps."""

    def __init__(self, trainer: GRPOTrainer, rows: list[dict[str, Any]], every: int) -> None:
        self.trainer, self.rows, self.every, self.records = trainer, rows, every, list[dict[str, Any]]()

    def measure(self, step: int) -> None:
        trajectories = [(r["prompt"][0]["content"], r["name"], look(r["name"]), r["answer"]) for r in self.rows]
        with torch.no_grad():
            p = log_probs(self.trainer.model, *encode(self.trainer.processing_class, trajectories)).exp()
        kinds = {kind: torch.tensor([row["kind"] == kind for row in self.rows]) for kind in MIXTURE}
        by_kind = {kind: p[own].mean().item() for kind, own in kinds.items()}
        self.records.append({"step": step, 1: pass_at_k(p, 1).item(), K: pass_at_k(p, K).item(), **by_kind})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.measure(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)


def print_trajectory(trainer: GRPOTrainer) -> None:
    """One trajectory of the probe's, from TRL's own tool loop, and its mask of policy tokens."""
    rows = make_prompts("probe", 100, seed=0)[:1]
    samples, tokenizer = TRLSampler(trainer).sample(rows, 2, seed=0), trainer.processing_class
    prompt, ids, mask = samples.prompt_ids[0], samples.completion_ids[0], samples.policy_masks[0]
    tokens = [tokenizer.decode([token]) for token in [*prompt, *ids]]
    marks = [" "] * len(prompt) + [".-"[not own] for own in mask]
    print(f"\nA trajectory, its mask (. sampled by the policy, - not), its reward ({rows[0]['answer']} is right):")
    print("   ", "".join(tokens))
    print("   ", "".join(mark * len(token) for mark, token in zip(marks, tokens, strict=True)))
    columns = {name: [row[name] for row in rows] for name in ("name", "answer")}
    print("   ", correct(samples.completions[:1], **columns)[0], flush=True)


def make_trainer(model: Any, out: Path, seed: int, steps: int, prompts: int) -> GRPOTrainer:
    """TRL's GRPOTrainer with the tool and its own advantages."""
    settings = {
        "max_completion_length": LENGTH,
        "max_tool_calling_iterations": 1,
        "learning_rate": 0.02 * LENGTH / 5,  # as examples/interference.demo: dr_grpo divides by the longest length
        "per_device_train_batch_size": 16 * prompts,
        "report_to": [],
        "disable_tqdm": True,
    }
    return GRPOTrainer(
        model,
        reward_funcs=[correct],
        args=make_config(out, steps=steps, seed=seed, **settings),
        train_dataset=Dataset.from_list(make_prompts("train", steps * prompts, seed)),
        processing_class=make_tokenizer(),
        tools=[look],
    )


def run(arm: str, model_dir: Path, out: Path, seed: int, quick: bool) -> list[dict[str, Any]]:
    """GRPO on pass@k from the warm start, with the guard observing or holding."""
    steps, prompts, every = (4, 4, 2) if quick else (60, 32, 5)
    trainer = make_trainer(AutoModelForCausalLM.from_pretrained(model_dir), out, seed, steps, prompts)
    trainer.remove_callback(PrinterCallback)
    if arm == "observe":
        print_trajectory(trainer)
    print(f"\n{arm}: {steps} steps of GRPO on pass@{K}", flush=True)
    rates = ExactRates(trainer, make_prompts("test", 64 if quick else 768, seed=0), 2 * every)
    trainer.add_callback(rates)
    (out / "passk_guard.jsonl").unlink(missing_ok=True)  # the guard appends, for runs that are resumed
    settings = {"probe_prompts": 16 if quick else 64, "refresh_steps": every, "mitigation": "off"}
    settings |= {"mitigation": "hold"} if arm == "hold" else {}
    with passk_guard.PassKObjective(trainer, k=K):
        passk_guard.watch(trainer, probe=make_prompts("probe", 1000, seed), correct=correct, k=K, **settings)
        trainer.train()
    return rates.records


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts, the model and the training")
    parser.add_argument("--out", type=Path, default=Path("runs/tool_use"), help="where results are written")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that shows that everything works")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the stack's own renamed settings
    disable_progress_bar()  # of a model being loaded
    own = logging.StreamHandler(sys.stdout)  # the guard's lines, among those of the run
    logger = logging.getLogger("passk_guard")
    logger.addHandler(own)
    started = time.monotonic()
    try:
        model_dir = warm_start(args.out / "warm_start", args.seed, 10 if args.quick else 400)
        print(f"Warm start: {time.monotonic() - started:.0f} s, in {model_dir}", flush=True)
        found = {arm: run(arm, model_dir, args.out / arm, args.seed, args.quick) for arm in ("observe", "hold")}
    finally:
        logger.removeHandler(own)
    print(f"\nExact, on prompts that neither training nor the probe has\n{'':8}step  pass@1  pass@{K}  pass@1 by kind")
    for arm, records in found.items():
        for record in records:
            kinds = "  ".join(f"{kind} {record[kind]:.3f}" for kind in MIXTURE)
            print(f"{arm:8}{record['step']:4}  {record[1]:.3f}   {record[K]:.3f}   {kinds}")
        change = [records[-1][k] - records[0][k] for k in (1, K)]
        print(f"{arm:8}pass@1 {change[0]:+.3f}, pass@{K} {change[1]:+.3f}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return found


if __name__ == "__main__":
    main()
