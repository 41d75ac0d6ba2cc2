"""The paper's table against its formula, and the example from a checkpoint to the printed lines."""

import pytest
import torch

from examples.paper_protocol import (
    Thresholds,
    main,
    mean_over_pairs,
    measure_both,
    paper_kernel,
    paper_rows,
    print_table,
)
from passk_guard import estimate_conflict
from passk_guard.analysis import Settings
from passk_guard.analysis.estimates import jackknife_error
from passk_guard.analysis.run import ALL, LAST, measure
from passk_guard.estimation.records import ProbeGram
from tests.analysis.cases import QUICK, PromptSampler, save_model, write_probe
from tests.helpers.populations import draw, population
from tests.helpers.tiny import digit_reward, probe_rows, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def vectors():
    """Score sums [2m, d] of seven prompts, two of them without a gradient, and what they give."""
    generator = torch.Generator().manual_seed(7)
    n, c = torch.tensor([8, 8, 8, 6, 8, 8, 8]), torch.tensor([1, 0, 7, 3, 8, 4, 2])
    sums = torch.randn(14, 5, dtype=torch.float64, generator=generator)
    sums[:7][c == 0] = sums[7:][c == 0] = sums[:7][c == n] = sums[7:][c == n] = 0.0
    return ProbeGram(sums @ sums.T, n, c, range(7)), sums


def test_the_papers_sum_is_its_formula(vectors):
    """(1/m^2) sum over all pairs of plug-in w_k(x) <S+_x / n, S+_x' / n'>."""
    probe, sums = vectors
    rate = (probe.num_correct / probe.num_samples).tolist()
    plain = [sums[i] / int(probe.num_samples[i]) for i in range(7)]
    parts = {"hard": 0.0, "easy": 0.0, "middle": 0.0}
    for x in range(7):
        group = "hard" if rate[x] <= 0.25 else "easy" if rate[x] >= 0.75 else "middle"
        for other in range(7):
            parts[group] += 4 * (1 - rate[x]) ** 3 * float(plain[x] @ plain[other]) / 49
    (row,) = paper_rows(probe, Settings(ks=(4,), num_samples=8), Thresholds())
    assert [int(group.sum()) for group in Thresholds().groups(probe)] == [3, 2, 2]
    for name, value in parts.items():
        assert getattr(row, name).value == pytest.approx(value)
    assert row.paper.value == pytest.approx(sum(parts.values()))
    assert row.hard.value + row.easy.value + row.middle.value == pytest.approx(row.paper.value)


def test_the_papers_sum_has_the_jackknifes_error(vectors):
    probe, _ = vectors
    hard, _, _ = Thresholds().groups(probe)
    _, error = mean_over_pairs(paper_kernel(probe, 4), hard)
    values = []
    for left_out in range(7):
        rest = torch.tensor([i for i in range(7) if i != left_out])
        rows = torch.cat([rest, rest + 7])
        small = ProbeGram(probe.gram[rows][:, rows], probe.num_samples[rest], probe.num_correct[rest])
        values.append(mean_over_pairs(paper_kernel(small, 4), Thresholds().groups(small)[0])[0])
    assert error == pytest.approx(jackknife_error(torch.tensor(values)), rel=1e-5)


def test_ours_beside_it_is_the_estimators(vectors):
    probe = draw(population(-0.5), 40, 16, torch.Generator().manual_seed(0))
    (row,) = paper_rows(probe, Settings(ks=(8,), num_samples=16), Thresholds())
    expected = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 8)
    assert row.ours.value == expected.inner_product
    assert (row.cosine.value, row.status) == (expected.cosine, expected.status)


def test_both_sets_of_parameters_have_the_same_samples():
    settings = QUICK | {"sketch_method": "identity"}
    given = (tiny_model(), tiny_tokenizer(), probe_rows(13), digit_reward)
    found = measure_both(*given, Settings(**settings), sampler=PromptSampler())
    alone = measure(*given, Settings(**settings, last_layer=True), sampler=PromptSampler()).refresh.probe
    assert list(found) == [ALL, LAST]
    assert torch.equal(found[LAST].gram, alone.gram)
    assert torch.equal(found[ALL].num_correct, found[LAST].num_correct)
    assert not torch.allclose(found[ALL].gram, found[LAST].gram)


def test_from_a_checkpoint_to_the_table(tmp_path, capsys):
    model, probe = save_model(tmp_path / "model"), write_probe(tmp_path / "probe.jsonl")
    given = [str(model), "--probe", str(probe), "--correct", "tests.helpers.tiny:digit_reward"]
    given += ["--out", str(tmp_path / "out"), "--samples", "8", "--k", "1,2,4", "--max-new-tokens", "4"]
    main(given)
    counts, _, *rows = capsys.readouterr().out.splitlines()[-6:]
    assert "easy (p-hat >= 0.75)" in counts
    assert [row.split("  ")[0] for row in rows] == [ALL, ALL, LAST, LAST]
    assert len((tmp_path / "out" / "rollouts" / "rank0.jsonl").read_text().splitlines()) == 13
    with pytest.raises(SystemExit):
        main([*given, "--delta-1", "0.8"])


def test_what_is_undetermined_is_printed_as_such(capsys):
    probe = draw(population(-0.5), 2, 16, torch.Generator().manual_seed(0))
    print_table({ALL: probe}, Settings(ks=(8,), num_samples=16), Thresholds())
    assert "undetermined" in capsys.readouterr().out
