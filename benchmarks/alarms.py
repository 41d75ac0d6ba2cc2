"""Which alarm goes, when, and how often in vain: the guard's verdicts beside the rules that teams use.

    python -m benchmarks.alarms [--seeds 40 41 ...] [--starts 0 40 ...] [--settings conflict mild none]
    python -m benchmarks.alarms --report [--picture docs/alarms.png]

The interference task, 40 steps of 16 prompts x 16, a check every 5 steps with 64 prompts x 16. Three settings: pass@8
with SGD at 0.02 (a conflict: pass@1 falls), the same at 0.005 (a mild one), and pass@1 at 0.02 (none: pass@1 rises).
A run records at each check what any of the rules needs. The rules are applied to the records in the report, so that a
threshold can be changed without another run. Fresh samples are drawn from the exact pass rates of the policy: of new
prompts, and of the same 64 prompts at each check. Entropy and KL are those of the guard's own completions.

For the rules on fresh samples there are also simulated runs in which nothing moves.

An alarm is false where exact pass@1 is at no check from then on 0.01 below what it was before that check: a forecast
that comes true is no false alarm. A run's fall is the largest from one check to a later one. What is still to come of
it at the alarm is a share of that fall, in runs whose fall is at least 0.01.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from benchmarks.calibration_file import Measurement, Record, read, take_missing
from benchmarks.change import exact_rates, passed
from examples.interference.arms import ARMS
from examples.interference.task import correct, make_prompts
from examples.interference.train import train
from examples.interference.warm_start import warm_start
from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective, ProbeSet
from passk_guard.change.cumulate import sequence_width
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.passk.closed_forms import pass_at_k
from passk_guard.probe.records import padding_token
from passk_guard.probe.samplers import TRLSampler
from passk_guard.utils.isolation import seeded, untouched

K, STEPS, EVERY, PROMPTS, SAMPLES, POPULATION = 8, 40, 5, 64, 16, 1024
BATCH = 256
FALL = 0.01
"""Of pass@1, below which a run has not fallen."""


@dataclass(frozen=True)
class Setting:
    """A kind of run: its learning rate and its objective."""

    title: str
    learning_rate: float
    objective: Callable[..., PassKObjective] = PassKObjective


SETTINGS = {
    "conflict": Setting("pass@8, learning rate 0.02", 0.02),
    "mild": Setting("pass@8, learning rate 0.005", 0.005),
    "none": Setting("pass@1, learning rate 0.02", 0.02, ARMS["pass_at_1"].objective),
}

Checks = Sequence[Record]
"""The checks of one run, the earliest first."""


def _first(checks: Checks, alarmed: Callable[[Record], bool]) -> int | None:
    return next((check["step"] for check in checks if alarmed(check)), None)


def losing(checks: Checks, alpha: float = 0.05) -> int | None:
    """The guard's LOSING: evidence of the run that pass@1 is falling, valid at all checks."""
    return _first(checks, lambda check: check["losing_p"] <= alpha)


def conflict(checks: Checks, alpha: float = 0.05) -> int | None:
    """The guard's CONFLICT: evidence of the run that the two gradients disagree, valid at all checks."""
    return _first(checks, lambda check: check["conflict_p"] <= alpha)


def sequence_below(checks: Checks, alpha: float = 0.05) -> int | None:
    """The change since the start is below 0 by its confidence sequence, taken as normal; no verdict of the guard's."""
    unit = next((check["variance"] for check in checks if check["variance"]), 0.0)
    return _first(checks, lambda c: c["total"] < -sequence_width(c["variance"], unit, alpha))


def up_and_down(checks: Checks, name: str) -> int | None:
    """pass@k above and pass@1 below their values at the start, as they are; `name` is `new` or `same` prompts."""
    one, many = (checks[0][f"{name}_{rate}"] for rate in ("pass_at_1", "pass_at_k"))
    return _first(checks, lambda check: check[f"{name}_pass_at_1"] < one and check[f"{name}_pass_at_k"] > many)


def paired_test(checks: Checks, alpha: float = 0.05) -> int | None:
    """One-sided t test at each check that pass@1 of the same prompts is below that at the start."""
    start = torch.tensor(checks[0]["right"], dtype=torch.float64)

    def lower(check: Record) -> bool:
        change = (torch.tensor(check["right"], dtype=torch.float64) - start) / SAMPLES
        error = float(change.std()) / math.sqrt(len(change))
        return float(change.mean()) < -student_t_quantile(1 - alpha, len(change) - 1) * error

    return _first(checks, lower)


def low_entropy(checks: Checks, share: float = 0.8) -> int | None:
    """The mean entropy of a token is below this share of that at the start."""
    return _first(checks, lambda check: check["entropy"] < share * checks[0]["entropy"])


def far_away(checks: Checks, nats: float = 0.1) -> int | None:
    """The mean log ratio of a token to the policy at the start is above this, under the present policy."""
    return _first(checks, lambda check: check["kl"] > nats)


RULES: dict[str, Callable[[Checks], int | None]] = {
    "LOSING": losing,
    "CONFLICT": conflict,
    "total below 0 by its sequence": sequence_below,
    "pass@8 up, pass@1 down; new prompts": lambda checks: up_and_down(checks, "new"),
    "pass@8 up, pass@1 down; same prompts": lambda checks: up_and_down(checks, "same"),
    "paired test of pass@1; same prompts": paired_test,
    "entropy 20% lower": low_entropy,
    "KL above 0.1 a token": far_away,
}


SAMPLED = tuple(name for name in RULES if "prompts" in name)
"""The rules on fresh samples alone."""


@dataclass(frozen=True)
class Alarm:
    """What one rule did in one run.

    Attributes:
        step: of the first alarm; None for none.
        false: it went, and pass@1 neither had fallen nor was to fall.
        fell: the run has a fall of at least `FALL`.
        to_come: share of that fall that was still to come; None without an alarm or without a fall.
    """

    step: int | None
    false: bool
    fell: bool
    to_come: float | None


def judge(rule: Callable[[Checks], int | None], checks: Checks) -> Alarm:
    """Apply a rule to a run; its fall is the largest there is from any check to a later one."""
    exact = [(check["step"], check["exact"]) for check in checks]
    falls = [(high - low, begin, end) for begin, high in exact for end, low in exact if begin <= end]
    fall, begin, end = max(falls, key=lambda found: found[0])
    fell, step = fall >= FALL, rule(checks)
    if step is None:
        return Alarm(None, False, fell, None)
    true = any(size >= FALL and until >= step for size, _, until in falls)
    below = dict(exact)[step] - dict(exact)[end]
    to_come = 1.0 if step <= begin else 0.0 if step >= end else min(1.0, max(0.0, below / fall))
    return Alarm(step, not true, fell, to_come if fell else None)


def runs_of(records: Sequence[Record], setting: str) -> dict[int, list[Record]]:
    """The checks of each run of a setting, by seed."""
    runs: dict[int, list[Record]] = {}
    for record in sorted((r for r in records if r["setting"] == setting), key=lambda r: (r["seed"], r["step"])):
        runs.setdefault(record["seed"], []).append(record)
    return runs


def figures(rule: Callable[[Checks], int | None], runs: Sequence[Checks]) -> dict[str, Any]:
    """Of one rule over the runs of a setting.

    Returns:
        runs, runs in which pass@1 fell, alarms, false alarms, falls without a true alarm, and the medians of the step
        of true alarms and of the share of the fall still to come at them; None where there are none.
    """
    found = [judge(rule, checks) for checks in runs]
    true = [alarm for alarm in found if alarm.fell and alarm.step is not None and not alarm.false]
    return {
        "runs": len(found),
        "fell": sum(alarm.fell for alarm in found),
        "alarms": sum(alarm.step is not None for alarm in found),
        "false": sum(alarm.false for alarm in found),
        "missed": sum(alarm.fell for alarm in found) - len(true),
        "step": statistics.median(alarm.step for alarm in true) if true else None,
        "to_come": statistics.median(alarm.to_come for alarm in true) if true else None,
    }


class Checker(TrainerCallback):
    """Records, after the guard's refresh of a step, what every rule needs."""

    def __init__(self, trainer: Any, guard: PassKGuardCallback, sampler: KeepingSampler, seed: int) -> None:
        self.trainer, self.guard, self.sampler, self.seed = trainer, guard, sampler, seed
        self.records = list[Record]()
        self._rows = make_prompts("probe", POPULATION, seed=seed)
        model = trainer.accelerator.unwrap_model(trainer.model)
        with seeded(seed):  # a deep copy of a prepared model would call the original's forward
            self._start = type(model)(model.config)
        self._start.load_state_dict(model.state_dict())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if step % EVERY:
            return
        model, tokenizer = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
        with untouched(model, tokenizer), seeded(1000 * self.seed + step):
            rates = exact_rates(model, tokenizer, self._rows)
            sampled = _sampled(rates)
            entropy, kl = self._entropy_and_kl(model, padding_token(tokenizer))
        memory = self.guard.memory
        estimate = self.guard.estimate
        self.records.append(
            {"step": step, "exact": passed(rates, 1), "exact_k": passed(rates, K)}
            | {"losing_p": memory.change.evidence.p_value, "outcome": memory.change.outcome.outcome}
            | {"total": memory.change.sums.pass_at_1.total, "variance": memory.change.sums.pass_at_1.variance}
            | {"conflict_p": memory.evidence.p_value, "verdict": memory.decision.verdict}
            | {"cosine": None if estimate is None else estimate.cosine}
            | sampled
            | {"entropy": entropy, "kl": kl}
        )

    @torch.no_grad()
    def _entropy_and_kl(self, model: Any, pad: int) -> tuple[float, float]:
        """Of a token of the guard's completions: entropy, and log ratio to the start, means over tokens in nats."""
        prompts, completions = self.sampler.kept.prompt_ids, self.sampler.kept.completion_ids
        length = len(prompts[0])  # the same for every prompt of the task
        longest = max(map(len, completions))
        ids = torch.tensor([[*x, *y, *[pad] * (longest - len(y))] for x, y in zip(prompts, completions, strict=True)])
        counted = torch.arange(longest) < torch.tensor([[len(y)] for y in completions])
        targets = ids[:, length:, None]
        now, start = (
            policy(input_ids=ids, use_cache=False).logits[:, length - 1 : -1].double().log_softmax(-1)
            for policy in (model, self._start)
        )
        entropy, ratio = -(now.exp() * now).sum(-1), (now - start).gather(-1, targets).squeeze(-1)
        return float(entropy[counted].mean()), float(ratio[counted].mean())


class KeepingSampler(TRLSampler):
    """The trainer's own sampling; the newest samples stay at hand as `kept`."""

    kept: Any = None

    def sample(self, rows: Any, num_samples: int, seed: int) -> Any:
        self.kept = super().sample(rows, num_samples, seed)
        return self.kept


def _sampled(rates: Tensor) -> Record:
    """What the rules on fresh samples need: of the first prompts, and of as many chosen anew."""
    size = torch.full((PROMPTS,), float(SAMPLES), dtype=torch.float64)
    same = torch.binomial(size, rates[:PROMPTS]).long()
    new = torch.binomial(size, rates[torch.randperm(len(rates))[:PROMPTS]]).long()
    return {"right": same.tolist(), "same_pass_at_1": _rate(same, 1), "same_pass_at_k": _rate(same, K)} | {
        "new_pass_at_1": _rate(new, 1),
        "new_pass_at_k": _rate(new, K),
    }


def still(start: int, cache: Path, runs: int = 2000) -> list[Record]:
    """Runs in which nothing moves, simulated from the exact pass rates of a warm start: shares with an alarm."""
    folder = warm_start(cache, start)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rates = exact_rates(model, tokenizer, make_prompts("probe", POPULATION, seed=start))
    alarms = dict.fromkeys(SAMPLED, 0)
    with seeded(start):
        for _ in range(runs):
            checks = [{"step": step} | _sampled(rates) for step in range(0, STEPS + 1, EVERY)]
            for rule in SAMPLED:
                alarms[rule] += RULES[rule](checks) is not None
    return [{"rule": rule, "runs": runs, "share": count / runs} for rule, count in alarms.items()]


def _rate(right: Tensor, k: int) -> float:
    return float(pass_at_k(SAMPLES, right, k).mean())


def run(name: str, seed: int, start: int, cache: Path) -> list[Record]:
    """One guarded run that is not mitigated, and its checks."""
    kept: list[Checker] = []

    def prepare(trainer: Any) -> None:
        config = GuardConfig(k=K, probe_prompts=PROMPTS, num_samples=SAMPLES, refresh_steps=EVERY, probe_seed=seed)
        probe, sampler = ProbeSet.from_list(make_prompts("probe", POPULATION, seed=seed)), KeepingSampler(trainer)
        guard = PassKGuardCallback(trainer, probe=probe, correct=correct, config=config, sampler=sampler)
        kept.append(Checker(trainer, guard, sampler, seed))
        for callback in (guard, kept[0]):
            trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)

    setting = SETTINGS[name]
    settings = {"learning_rate": setting.learning_rate, "per_device_train_batch_size": BATCH}
    settings |= {"report_to": [], "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        train(
            warm_start(cache, start),
            folder,
            steps=STEPS + 1,  # the last check is before a step
            k=K,
            seed=seed,
            evaluate_every=STEPS,
            prepare=prepare,
            objective=setting.objective,
            **settings,
        )
    return [{"start": start} | record for record in kept[0].records]


def plan(settings: list[str], seeds: list[int], starts: list[int] | None, cache: Path) -> Iterator[Measurement]:
    """One measurement a run; each seed has a warm start of its own where no `starts` are given."""
    for i, seed in enumerate(seeds):
        start = starts[i % len(starts)] if starts else seed
        for name in settings:
            asked: Record = {"setting": name, "seed": seed}
            yield Measurement(asked, lambda name=name, seed=seed, start=start: run(name, seed, start, cache))
    for start in starts or seeds:
        yield Measurement({"setting": "still", "seed": start}, lambda start=start: still(start, cache))


def print_table(console: Console, records: list[Record]) -> None:
    """Each rule in each setting."""
    table = Table(title="alarms, a check every 5 steps of 40; medians over the runs with a true alarm", box=MARKDOWN)
    headings = ("setting", "rule", "runs", "fall", "alarms", "false", "falls missed", "step", "still to come")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for name in SETTINGS:
        runs = list(runs_of(records, name).values())
        for title, rule in RULES.items() if runs else ():
            f = figures(rule, runs)
            table.add_row(
                *(name, title, *(str(f[column]) for column in ("runs", "fell", "alarms", "false", "missed"))),
                "" if f["step"] is None else f"{f['step']:g}",
                "" if f["to_come"] is None else f"{100 * f['to_come']:.0f}%",
            )
    console.print(table)
    for rule in SAMPLED:
        found = [r for r in records if r["setting"] == "still" and r["rule"] == rule]
        shares = ", ".join(f"{100 * r['share']:.1f}%" for r in found)
        if found:
            console.print(f"{rule}: alarms in {shares} of {found[0]['runs']} runs in which nothing moves")


def draw(path: Path, records: list[Record]) -> None:
    """Exact pass@1 of each run, a panel for each setting, and below it the first alarm of each rule."""
    names = [name for name in SETTINGS if runs_of(records, name)]
    figure = Figure(figsize=(3.4 * len(names) + 1.6, 4.6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 2])
    for column, name in enumerate(names):
        above, below = panels[0][column], panels[1][column]
        runs = list(runs_of(records, name).values())
        for checks in runs:
            above.plot([c["step"] for c in checks], [c["exact"] for c in checks], color="#0072b2", linewidth=1.2)
        above.set(title=f"{name}: {SETTINGS[name].title}", ylabel="" if column else "exact pass@1")
        above.title.set_fontsize(9)
        for row, rule in enumerate(RULES.values()):
            for i, alarm in enumerate(judge(rule, checks) for checks in runs):
                if alarm.step is not None:
                    colour = "#d55e00" if alarm.false else "#009e73"
                    place = -row + 0.3 * (0.5 - (i + 0.5) / len(runs))
                    below.plot(alarm.step, place, "x" if alarm.false else "o", color=colour, markersize=5)
        below.set(xlabel="step", xlim=(-2, STEPS + 2), ylim=(0.5 - len(RULES), 0.5))
        below.set_yticks([-row for row in range(len(RULES))], RULES, fontsize=7)
        below.grid(axis="y", linewidth=0.4)
    figure.suptitle("first alarm of each run: green dots came true, orange crosses were false", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(40, 48)))
    parser.add_argument("--starts", type=int, nargs="+", help="seeds of warm starts, in turn; default each its own")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/alarms.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    parser.add_argument("--report", action="store_true", help="print the table and measure nothing")
    parser.add_argument("--picture", type=Path, help="draw the alarms as PNG")
    given = parser.parse_args()
    if not given.report:
        take_missing(list(plan(given.settings, given.seeds, given.starts, given.cache)), given.results)
    records = read(given.results)
    print_table(Console(width=130), records)
    if given.picture:
        draw(given.picture, records)


if __name__ == "__main__":
    main()
