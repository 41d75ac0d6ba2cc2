"""`analyze --rollouts`: numbers against loops and closed forms, what other programs dump, and what is refused."""

import json
import math
import random

import pytest
import torch

from passk_guard.analysis import analyze_rollouts
from passk_guard.analysis.rollout_file import as_matrices, read_rollouts
from passk_guard.change import change_by_solve_rate, estimate_change
from passk_guard.cli import main
from passk_guard.passk.closed_forms import passk_advantages
from passk_guard.utils.errors import GuardError
from tests.helpers.hostile import PAYLOADS
from tests.security.test_hostile_texts import check

VERL = {"prompt": "input", "completion": "output", "correct": "score"}
SCORED = VERL | {"logprob": "old", "logprob_new": "new", "group": "level"}


def dumped(prompts, n=8, seed=0):
    """Rows of verl's dump, shuffled, of a policy that is right with p and of one that is right with q."""
    numbers, rows = random.Random(seed), []
    for i in range(prompts):
        p = (i + 0.5) / prompts
        q = p + 0.02 * math.sin(i)
        for _ in range(n):
            right = numbers.random() < p
            row = {"input": f"what is {i}?", "output": f"{i}" if right else "no", "score": float(right), "step": 7}
            row |= {"old": math.log(p if right else 1 - p), "level": "easy" if p > 0.5 else "hard"}
            rows.append(row | {"new": math.log(q if right else 1 - q)})
    numbers.shuffle(rows)
    return rows


def written(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def by_prompt(rows):
    """The scores and log ratios of each prompt, in the order of the file."""
    found = {}
    for row in rows:
        scores, ratios = found.setdefault(row["input"], ([], []))
        scores.append(row["score"])
        ratios.append(row["new"] - row["old"])
    return list(found.values())


def test_rates_weights_and_shares_are_those_of_loops(tmp_path):
    rows = dumped(12)
    found = analyze_rollouts(written(tmp_path / "7.jsonl", rows), VERL, ks=(2, 4))
    each = [int(sum(scores)) for scores, _ in by_prompt(rows)]
    assert [at.k for at in found.at_k] == [1, 2, 4]
    for at in found.at_k:
        rates = [1 - math.comb(8 - c, at.k) / math.comb(8, at.k) for c in each]
        middle = sum(rates) / 12
        assert at.pass_rate.value == pytest.approx(middle)
        error = math.sqrt(sum((rate - middle) ** 2 for rate in rates) / 11 / 12)
        assert at.pass_rate.standard_error == pytest.approx(error)
        weights = [at.k * math.comb(8 - c, at.k - 1) / math.comb(8, at.k - 1) for c in each]
        assert at.mean_weight.value == pytest.approx(sum(weights) / 12)
        assert at.change is None
    mass = [passk_advantages(torch.tensor([scores]), 4).abs().mean().item() for scores, _ in by_prompt(rows)]
    assert [one.share_k for one in found.prompts] == pytest.approx([one / sum(mass) for one in mass])
    assert [one.num_correct for one in found.prompts] == each
    mass_1 = [2 * c * (8 - c) / (8 * 7) for c in each]
    hard = [i for i, c in enumerate(each) if c / 8 < 1 / 3]
    assert found.hard.num_prompts == len(hard)
    assert found.hard.share_1.value == pytest.approx(sum(mass_1[i] for i in hard) / sum(mass_1))
    bins = ["never" if c == 0 else "always" if c == 8 else f"{10 * c // 8 / 10:.1f} to" for c in each]
    assert sum(part.num_prompts for part in found.solve_rates) == 12
    for part in found.solve_rates:
        assert part.num_prompts == sum(part.name.startswith(name) for name in bins)
    assert sum(part.share_k.value for part in found.solve_rates) == pytest.approx(1)


def test_the_change_is_that_of_estimate_change_and_of_the_closed_form(tmp_path):
    rows = dumped(24)
    found = analyze_rollouts(written(tmp_path / "7.jsonl", rows), SCORED, ks=(4,))
    kept = by_prompt(rows)
    correct, ratios = (torch.tensor([one[i] for one in kept]) for i in (0, 1))
    levels = ["easy" if int(row["input"][8:-1]) >= 12 else "hard" for row in {r["input"]: r for r in rows}.values()]
    wanted = estimate_change(ratios, correct, 4, groups=levels)
    one, many = (at.change for at in found.at_k)
    assert (one.value, one.standard_error) == pytest.approx((wanted.pass_at_1, wanted.pass_at_1_se))
    assert (many.value, many.standard_error) == pytest.approx((wanted.pass_at_k, wanted.pass_at_k_se))
    assert one.low < one.value < one.high
    assert found.effective_samples == pytest.approx(wanted.effective_samples)
    for part in found.groups:
        group = wanted.groups[part.name]
        assert (part.num_prompts, part.change.value) == (group.num_prompts, pytest.approx(group.pass_at_1))
        assert part.change_k.value == pytest.approx(group.pass_at_k)
    rates = change_by_solve_rate(ratios, correct)
    assert [got["change"].value for got in found.change_by_solve_rate] == pytest.approx([r.pass_at_1 for r in rates])
    assert [prompt.change for prompt in found.prompts] == pytest.approx(wanted.per_prompt.tolist())
    # Below 8 prompts no coefficient is fitted: c (n - c) / (n (n - 1)) times the ratio of the right less the wrong.
    few = [row for row in rows if int(row["input"][8:-1]) in (9, 11, 13, 15)]
    parts = []
    for scores, logs in by_prompt(few):
        c, ratio = int(sum(scores)), {score: math.exp(log) for score, log in zip(scores, logs, strict=True)}
        parts.append(c * (8 - c) / 56 * (ratio.get(1.0, 0) - ratio.get(0.0, 0)))
    found = analyze_rollouts(written(tmp_path / "few.jsonl", few), SCORED, ks=(1,))
    assert found.at_k[0].change.value == pytest.approx(sum(parts) / 4)


def test_log_probabilities_of_tokens_are_added_up(tmp_path):
    rows = dumped(12)
    split = [row | {name: [row[name] / 4] * 4 for name in ("old", "new")} for row in rows]
    whole, parts = (
        analyze_rollouts(written(tmp_path / f"{i}.jsonl", one), SCORED) for i, one in enumerate((rows, split))
    )
    assert whole.at_k[-1].change.value == pytest.approx(parts.at_k[-1].change.value)


def test_parquet_of_messages_is_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [row | {"input": [{"role": "user", "content": row["input"]}]} for row in dumped(12)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "completions_00007.parquet")
    table, lines = (
        read_rollouts(path, SCORED)
        for path in (tmp_path / "completions_00007.parquet", written(tmp_path / "7.jsonl", rows))
    )
    assert table == lines
    assert table[0].text.startswith("user: what is ")
    (tmp_path / "x.parquet").write_text("no")
    for name in ("x", "none"):
        with pytest.raises(GuardError, match="Expected a parquet file"):
            read_rollouts(tmp_path / f"{name}.parquet")


def test_prompts_with_few_verdicts_are_left_out_and_clusters_widen(tmp_path):
    rows = dumped(12)
    rows += [{**rows[0], "input": "one more", "score": None}, {**rows[0], "input": "one more", "score": math.nan}]
    rows = [row | {"source": f"{int(row['input'][8:-1]) // 3 if 'what' in row['input'] else 9}"} for row in rows]
    path = written(tmp_path / "7.jsonl", rows)
    found, apart = (analyze_rollouts(path, SCORED, ks=(4,), cluster_by=by) for by in ("source", None))
    assert (found.num_prompts, found.left_out, found.no_verdict, found.num_rollouts) == (12, 1, 2, 98)
    assert found.at_k[0].pass_rate.standard_error > 1.3 * apart.at_k[0].pass_rate.standard_error
    assert "one more" not in found.to_json()
    verdicts, _, there = as_matrices(read_rollouts(path, SCORED))
    assert verdicts[-1].tolist() in ([-1, -1, 0, 0, 0, 0, 0, 0], verdicts[-1].tolist())
    assert int(there.sum()) == 98


GOOD = {"prompt": "a", "correct": True}
SCORES = {"prompt": "a", "correct": 1, "logprob": -1.0, "logprob_new": -1.0}


@pytest.mark.parametrize(
    ("line", "columns", "words"),
    [
        ("{", {}, "malformed JSON in 7.jsonl, line 2"),
        ("[1]", {}, "Expected an object .* found \\[1\\] in 7.jsonl, line 2"),
        ({"prompt": "a"}, {}, "the column 'correct' in every row; found 'prompt' in 7.jsonl, line 2"),
        ({"prompt": "", "correct": 1}, {}, "'prompt' to be a non-empty text, .* found '' in 7.jsonl, line 2"),
        ({"prompt": "a", "correct": "true"}, {}, "'correct' to be true or false, .* found 'true' in 7.jsonl, line 2"),
        ({**GOOD, "step": 2}, {"step": "step"}, "Expected rollouts of one step, .* found 1 and, in 7.jsonl, line 2, 2"),
        ({**SCORES, "logprob": 0.7}, {}, "'logprob' to be a log-probability in nats, at most 0, .* found 0.7 in"),
        ({**SCORES, "logprob_new": None}, {}, "'logprob_new' to be a log-probability .* found None in 7.jsonl, line 2"),
        ({**SCORES, "logprob": [-1.0, -1.0]}, {}, "line 2. 'logprob_new' has 1 tokens"),
        ({**SCORES, "logprob": [-math.inf]}, {}, "found \\[-inf\\] in 7.jsonl, line 2"),
        ({**GOOD, "group": "b"}, {"group": "group"}, "found 'b' in 7.jsonl, line 2. Rows of this prompt before it"),
        ({**GOOD, "group": None}, {"group": "group"}, "'group' to be a text or a number; found None in 7.jsonl, line"),
        (GOOD, {"prompt": "question"}, "the column 'question' in every row; found .* in 7.jsonl, line 1"),
        (GOOD, {"promt": "prompt"}, "named among prompt, correct, .*; found 'promt'"),
        (GOOD, {}, "at least 3 different prompts, .* found 1 in 7.jsonl"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line, columns, words, tmp_path):
    first = SCORES if isinstance(line, dict) and "logprob" in line else GOOD
    first = {**first, "group": "a", "step": 1} if columns.keys() & {"group", "step"} else first
    second = {**first, **line} if isinstance(line, dict) and "correct" in line else line
    with pytest.raises(GuardError, match=words):
        read_rollouts(written(tmp_path / "7.jsonl", [first, second]), columns)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (
            [{"input": "a", "score": 1}],
            {},
            "a column `prompt`, .*; found 'input', 'score' in .*, line 1. .*--columns",
        ),
        ([SCORES | {"logprob_new": -1}, {}], {"columns": {"logprob": "x"}}, "the column 'x' in every row"),
        ([{k: SCORES[k] for k in ("prompt", "correct", "logprob")}], {}, "Expected both `logprob`"),
        ([{"prompt": i, "correct": 1, "group": i} for i in range(21)], {}, "at most 20 groups in the column 'group'"),
        ([{"prompt": i, "correct": 1} for i in range(5)], {"ks": (2,)}, "at least 3 prompts with 2 verdicts"),
        ([{"prompt": i, "correct": 1} for i in range(5)], {"ks": (0,)}, "whole numbers k >= 1"),
        ([{"prompt": i, "correct": 1} for i in range(5)], {"confidence": 1}, "`confidence` < 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(rows, options, words, tmp_path):
    with pytest.raises(GuardError, match=words):
        analyze_rollouts(written(tmp_path / "7.jsonl", rows), **options)


def test_a_reward_stands_for_a_verdict_and_no_prompt_need_be_solved_sometimes(tmp_path):
    rows = [{"prompt": f"p{i}", "reward": float(i > 1)} for i in range(4) for _ in range(2)]
    found = analyze_rollouts(written(tmp_path / "7.jsonl", rows))
    assert found.at_k[-1].k == 2
    assert found.at_k[0].pass_rate.value == 0.5
    assert "No prompt is solved sometimes" in found.verdict
    assert "<html" in found.html
    assert analyze_rollouts(tmp_path / "7.jsonl", correct_threshold=2).at_k[0].pass_rate.value == 0


NAMED = ["--columns", *(f"{name}={column}" for name, column in SCORED.items())]


def test_the_command_prints_and_writes(tmp_path, capsys):
    path, out = written(tmp_path / "7.jsonl", dumped(24)), tmp_path / "out"
    assert main(["analyze", "--rollouts", str(path), *NAMED, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Between the two policies ")
    assert max(map(len, said.split("\n\nWritten")[0].splitlines())) <= 80
    assert "Change by group" in said
    assert main(["analyze", "--rollouts", str(path), *NAMED, "--json", "--k", "2"]) == 0
    assert [at["k"] for at in json.loads(capsys.readouterr().out)["at_k"]] == [1, 2]
    assert json.loads((out / "rollouts.json").read_text())["at_k"][-1]["k"] == 4
    check((out / "rollouts.html").read_text(encoding="utf-8"))
    assert main(["analyze", "--rollouts", str(path), *NAMED, "--out", str(out)]) == 0, "its own page is replaced"
    (out / "rollouts.html").unlink()
    capsys.readouterr()
    assert main(["analyze", "--rollouts", str(path), *NAMED, "--out", str(out)]) == 1
    assert "without a page beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rollouts", "x", "--temperature", "2"], "--temperature has no use with --rollouts"),
        (["model", "--rollouts", "x"], "MODEL_DIR has no use with --rollouts"),
        (["--columns", "prompt"], "such as prompt=input correct=score"),
        (["--columns", "prompt=input"], "names those of --rollouts"),
        (["model", "--correct", "a:b", "--out", "o"], "--probe is missing; or pass --rollouts FILE"),
    ],
)
def test_wrong_usage(more, words, capsys):
    assert main(["analyze", *more]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_hostile_texts_are_data(tmp_path):
    rows = [{"prompt": f"{one} {i}", "correct": j, "group": one} for i, one in enumerate(PAYLOADS) for j in (0, 1)]
    found = analyze_rollouts(written(tmp_path / "7.jsonl", rows[:38]))
    check(found.html)
    assert all(line.isprintable() for line in found.text().replace("\u00a0", " ").splitlines())
