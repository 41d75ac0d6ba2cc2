"""The benchmark: its plan, its file of results, its statistics and each of its arms."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from examples import prompt_weights
from examples.interference import arms, choose_mixture, comparison, noiseless
from examples.interference.arms import ARMS, CORE, SETTINGS, PerModuleStep, ShortestStep, SoftStep, mixed
from examples.interference.benchmark import SEEDS, plan, run_missing
from examples.interference.benchmark_run import run
from examples.interference.model import make_model
from examples.interference.task import make_prompts
from examples.interference.tokenizer import make_tokenizer
from passk_guard import passk_advantages
from passk_guard.mitigation.protected_direction import DirectionNoise

TUNED_ON = {10, 11, 100}


def record(setting="main", arm="none", seed=12, one=(0.6, 0.5), many=(0.8, 0.9), **more):
    trajectory = [
        {"step": 20 * i, "pass_at_1": a, "pass_at_8": b} for i, (a, b) in enumerate(zip(one, many, strict=True))
    ]
    return {"setting": setting, "arm": arm, "seed": seed, "steps": 180, "k": 8, "trajectory": trajectory} | more


def test_the_plan_has_enough_seeds_and_none_that_defaults_were_chosen_on():
    jobs = plan(None, None, None, quick=False)
    assert len({job.key for job in jobs}) == len(jobs)
    seeds = Counter((job.setting, job.arm) for job in jobs)
    assert all(seeds["main", arm] >= (8 if arm in CORE else 4) for arm in ARMS)
    assert all(seeds[setting, arm] >= 3 for setting in SETTINGS for arm in CORE)
    assert not TUNED_ON & {job.seed for job in jobs}
    assert not TUNED_ON & set(SEEDS)
    assert {(job.arm, job.seed) for job in plan(["main"], ["floor"], [3], quick=False)} == {("floor", 3)}


def test_a_line_that_was_cut_off_is_dropped_and_replaced(tmp_path):
    path = tmp_path / "results.jsonl"
    comparison.append(path, record(seed=12))
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert [r["seed"] for r in comparison.read(path)] == [12]
    comparison.append(path, record(seed=13))
    assert [r["seed"] for r in comparison.read(path)] == [12, 13]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert comparison.read(tmp_path / "nothing.jsonl") == []


def test_what_is_done_is_not_run_again(tmp_path):
    path = tmp_path / "results.jsonl"
    jobs = plan(["main"], ["none"], [12, 13], quick=False)
    for job in jobs:
        comparison.append(path, record(seed=job.seed))
    before = path.read_text()
    run_missing(jobs, path, tmp_path / "no_warm_start", workers=1)
    assert path.read_text() == before
    assert not (tmp_path / "no_warm_start").exists()


def test_changes_and_their_intervals():
    runs = [record(seed=s, one=(0.6, 0.6 + d)) for s, d in zip(range(12, 16), (0.1, 0.2, 0.3, 0.4), strict=True)]
    found = comparison.change(runs, "pass_at_1")
    assert found.mean == pytest.approx(0.25)
    assert found.each == pytest.approx((0.1, 0.2, 0.3, 0.4))
    # Of the 4^4 means of resamples with replacement, exactly.
    values = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    means = torch.cartesian_prod(values, values, values, values).mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.013)
    # The gain that is kept is compared on the same seeds.
    runs = [record(seed=s, many=(0.8, 0.8 + gain)) for s, gain in ((12, 0.1), (13, 0.5))]
    runs += [record(arm="floor", seed=12, many=(0.8, 0.85))]
    assert comparison.kept(runs, "main", "floor") == pytest.approx(0.5)
    seldom, often = record(one=(0.6, 0.4, 0.5), many=(0, 0, 0)), record(one=(0.6, 0.4, 0.5), many=(0, 0, 0))
    often["trajectory"].insert(1, {"step": 5, "pass_at_1": 0.3})
    assert comparison.lowest([seldom, often]) == pytest.approx(-0.2)
    assert comparison.lowest([often], every=5) == pytest.approx(-0.3)
    assert comparison.lowest([seldom, often], every=5) is None


def test_the_picture_and_the_table_hold_every_arm(tmp_path, capsys):
    from rich.console import Console

    runs = [record(arm=arm, seed=s) for arm in ARMS for s in (12, 13)]
    comparison.draw(tmp_path / "picture.png", runs)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    comparison.print_table(Console(width=160), "main", runs)
    shown = capsys.readouterr().out
    assert all(arm.label in shown for arm in ARMS.values())


def test_without_a_cue_the_tag_says_nothing():
    rows = make_prompts("test", 2000, seed=0, cue=False)
    assert len({row["prompt"] for row in rows if row["prompt"][1] == "S"}) == sum(r["prompt"][1] == "S" for r in rows)
    share = {kind: Counter(row["prompt"][0] for row in rows if row["kind"] == kind) for kind in ("easy", "hard")}
    assert len(share["easy"]) == len(share["hard"]) == 16
    hard = {row["prompt"] for row in make_prompts("test", 1000, seed=1, mixture={"hard": 1.0}, cue=False)}
    easy = {row["prompt"] for row in make_prompts("test", 1000, seed=1, mixture={"easy": 1.0}, cue=False)}
    assert not hard & easy, "a prompt has one right answer"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A cache whose warm start of seed 0 is an untrained model: quick, and enough to go through the motions."""
    cache = tmp_path_factory.mktemp("cache")
    tokenizer = make_tokenizer()
    make_model(tokenizer, 0, hidden=16, layers=1, heads=2).save_pretrained(cache / "seed0")
    tokenizer.save_pretrained(cache / "seed0")
    return cache


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs(arm, untrained):
    small = {"per_device_train_batch_size": 64}
    found = run("main", arm, 0, untrained, steps=1, **small)
    assert (found["arm"], found["seed"], found["steps"], found["k"]) == (arm, 0, 1, 8)
    assert [point["step"] for point in found["trajectory"]] == [0, 1]
    assert (found["guard"]["refreshes"] + found["guard"]["failed_refresh"] > 0) == (ARMS[arm].guard is not None)
    json.dumps(found)


@pytest.mark.parametrize("arm", ["none", "hard_only", "anneal", "k_star", "recipe", "project", "per_module"])
def test_arms_without_noise(arm, untrained, monkeypatch):
    monkeypatch.setattr(noiseless, "RATE", 1e6)  # the pass rates of an untrained model are 1e-7
    found = noiseless.run(arm, 0, untrained, steps=1)
    assert [point["step"] for point in found["trajectory"]] == [0, 1]
    assert found["trajectory"][1]["pass_at_8"] > found["trajectory"][0]["pass_at_8"]
    assert set(found) == set(record()) | {"seconds"}
    json.dumps(found)


def test_the_tables_of_the_document_are_what_the_commands_print(capsys):
    prompt_weights.main([])
    root = Path(__file__).parents[2]
    document = (root / "docs" / "rivals.md").read_text().splitlines()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in document] == []
    lines = noiseless.table(comparison.read(root / "benchmarks" / "noiseless.jsonl"), [])
    without_twins = {line.rsplit("|", 3)[0] for line in document}  # the benchmark's file grows
    assert [line for line in lines[2:] if line.rsplit("|", 3)[0] not in without_twins] == []


class Trainer:
    """As much of a GRPOTrainer as an objective asks for."""

    reward_func_names = ("correct",)
    num_generations = 16

    class args:
        scale_rewards = "none"

    class state:
        global_step, max_steps = 0, 8

    def _generate_and_score_completions(self): ...

    def _calculate_rewards(self): ...


@pytest.mark.parametrize(("arm", "one", "many"), [("mixture", 0.3, 0.7), ("recipe", 1.0, 0.2)])
def test_a_mixture_is_a_mixture(arm, one, many):
    rewards = (torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    found = ARMS[arm].objective(Trainer(), k=8, floor=None, cap=None).advantages(rewards, 16)
    at_1, at_8 = (passk_advantages(rewards.view(4, 16), k).view(-1) for k in (1, 8))
    assert torch.allclose(found, one * at_1 + many * at_8)


def test_k_falls_from_8_to_1():
    trainer, rewards = Trainer(), torch.zeros(16)
    objective, seen = ARMS["anneal"].objective(trainer, k=8, floor=None, cap=None), []
    for trainer.state.global_step in range(8):
        objective.advantages(rewards, 16)
        seen.append(objective.k)
    assert seen == [8, 7, 6, 5, 4, 3, 2, 1]


def test_only_unsolved_prompts_are_kept():
    """Of 40 prompts those that certainly succeed are left out, and those that certainly fail are kept."""
    rows = [{"prompt": str(i), "p": float(i % 2)} for i in range(40)]
    trainer = Trainer()
    trainer.model = trainer.processing_class = None
    trainer.args.seed, trainer.train_dataset = 0, Dataset.from_list(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "success_probability", lambda _, __, rows: torch.tensor([row["p"] for row in rows]))
        arms.keep_unsolved(trainer)
    assert trainer.train_dataset["p"][:] == [0.0] * 20


def test_the_share_of_the_mixture_has_the_largest_sum_of_changes():
    shares = [0.1, 0.3, 0.5]
    ends = {mixed(0.1).label: (0.5, 0.95), mixed(0.3).label: (0.7, 0.89), mixed(0.5).label: (0.72, 0.8)}
    runs = [record(arm=arm, seed=100, one=(0.6, one), many=(0.7, many)) for arm, (one, many) in ends.items()]
    assert choose_mixture.chosen(runs, shares) == 0.3
    assert choose_mixture.chosen([], shares) is None
    kept_runs = comparison.read(Path(__file__).parents[2] / "benchmarks" / "mixture.jsonl")
    assert mixed(choose_mixture.chosen(kept_runs, [0.1, 0.3, 0.5, 0.7])).label == ARMS["mixture"].label
    assert {r["seed"] for r in kept_runs}.isdisjoint(SEEDS)


class Engine:
    """Holds g as a list of tensors."""

    def __init__(self, *parts):
        self.parts = [torch.tensor(part) for part in parts]

    def gradient(self):
        return self.parts

    def inner_products(self, pairs):
        return [sum(float((x * y).sum()) for x, y in zip(a, b, strict=True)) for a, b in pairs]

    def add_(self, direction, coefficient):
        for part, change in zip(self.parts, [part.clone() for part in direction], strict=True):
            part.add_(change, alpha=coefficient)


def guard_with(rule, engine):
    guard = rule.__new__(rule)
    guard.engine = engine
    return guard


def test_mgda_takes_the_shortest_step():
    """The shortest convex combination has equal products with both, where it lies strictly between them."""
    before, p, engine = torch.tensor([2.0, 1.0]), 5 * torch.tensor([-1.0, 1.5]), Engine([2.0, 1.0])
    guard_with(ShortestStep, engine)._project([p])
    [g] = engine.parts
    assert float(g @ before) == pytest.approx(float(g @ p / 5), rel=1e-4)
    assert float(g @ g) == pytest.approx(float(g @ before), rel=1e-4)


def test_per_module_surgery_leaves_no_module_in_conflict():
    engine, p = Engine([2.0, 1.0], [3.0], [-1.0, 0.0]), [torch.tensor(x) for x in ([-1.0, 1.0], [2.0], [1.0, 1.0])]
    guard_with(PerModuleStep, engine)._project(p)
    for found, expected in zip(engine.parts, ([1.5, 1.5], [3.0], [-0.5, 0.5]), strict=True):
        assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("noise", "kept"), [(0.0, 0.0), (0.5, -1.0), (2.0, -2.0)])
def test_a_soft_projection_moves_as_far_as_the_direction_is_known(noise, kept):
    """|p|^2 = 1 of which `noise` is noise: what is left of <g, p> = -2."""
    engine, p = Engine([-2.0, 1.0]), [torch.tensor([1.0, 0.0])]
    guard = guard_with(SoftStep, engine)
    guard.protected, guard._norm_sq, guard._noise = p, 1.0, DirectionNoise(noise)
    guard._project(p)
    assert engine.parts[0].tolist() == pytest.approx([kept, 1.0])
