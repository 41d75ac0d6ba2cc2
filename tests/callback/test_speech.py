"""What the guard says while it runs, and that `verbosity="quiet"` keeps it to changes and warnings."""

import dataclasses
import logging
import re
from types import SimpleNamespace

import pytest
import torch

import passk_guard
from passk_guard import ConflictEstimate, GuardConfig, PassKObjective, ProbeGram, passk_advantages
from passk_guard.callback import speech
from passk_guard.callback.budget import Account
from passk_guard.callback.facts import objective_of, trains_on
from passk_guard.callback.mitigator import NoMitigation
from passk_guard.callback.state import Memory
from passk_guard.probe.verifier import Verifier
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_rloo_trainer

SMALL = {"k": 4, "num_samples": 8, "probe_prompts": 12, "refresh_steps": 1, "sketch_dim": 512, "pool_refreshes": 2}
SMALL |= {"probe_max_new_tokens": 4}
NUMBER = r"[+-]?\d+(\.\d+)?"


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("passk_guard") and r.levelname == "WARNING"]


def same(text, pattern):
    """Whether the text is the pattern, where `#` stands for any number."""
    return re.fullmatch(re.escape(pattern).replace(r"\#", NUMBER), text) is not None


def test_a_run_speaks_at_its_start_at_the_first_refresh_where_it_cannot_tell_and_at_its_end(tmp_path, caplog):
    trainer = tiny_grpo_trainer(tmp_path, max_steps=3, learning_rate=1e-4)
    passk_guard.watch(trainer, probe=probe_rows(), correct=digit_reward, **SMALL)
    with caplog.at_level(logging.INFO, logger="passk_guard"):
        trainer.train()
    first, second, *_, end, command = lines = said(caplog)
    assert first == (
        "passk_guard watches cos(pass@1, pass@4) and the change of pass@1 and pass@4 at every step on 12 of 40 "
        "held-out prompts x 8 samples; 96 completions a refresh, beside 8 of training in one step; passes of at most "
        "16,384 tokens, about 0.039 GiB of memory; this run trains on GRPO (loss_type=dapo, scale_rewards=group), "
        "whose own angle to pass@1 is `objective_cosine`; the angle shows what training on pass@4 would do; the sketch "
        "covers 100.0% of the trainable parameters; action: observe"
    )
    assert second.startswith("passk_guard step 0: first refresh: pass@1 0.")
    assert same(second.rpartition("; ")[2], "it took # s")
    assert "; changes are counted from here; " in second
    (cannot,) = [line for line in lines if "step 1: the angle is UNDETERMINED: " in line]
    assert cannot.endswith("; next: raise `probe_prompts` from 12 to 40")
    assert same(
        end,
        "passk_guard ends at step 3: pass@1 # [#, #] to #, pass@4 # [#, #] to # by step 2; work of the probe # of "
        "that of training; HOLDING at step 1; 3 refreshes; # of # s in the probe (#%)",
    )
    assert command == f"passk_guard: the whole run on a page: passk-guard report {tmp_path}"


def test_every_number_of_a_row_is_explained(tmp_path):
    trainer = tiny_lm_trainer(tmp_path, max_steps=3, learning_rate=1e-4)
    passk_guard.watch(trainer, probe=probe_rows(), correct=digit_reward, **SMALL | {"probe_prompts": 40})
    trainer.train()
    names = {name for row in trainer.state.log_history for name in row if name.startswith("passk_guard/")}
    assert {"passk_guard/status", "passk_guard/weighted_prompts", "passk_guard/pass_at_4_total_ci_low"} <= names
    for name in names:
        stem = re.sub(r"_se$|_ci_low$|_ci_high$", "", name.removeprefix("passk_guard/").replace("at_4", "at_<k>"))
        assert f"`{stem}`" in passk_guard.watch.__doc__, name


def test_a_quiet_run_says_nothing_where_nothing_changes(tmp_path, caplog):
    trainer = tiny_lm_trainer(tmp_path, max_steps=2, learning_rate=0.0)
    passk_guard.watch(
        trainer, probe=probe_rows(), correct=digit_reward, **SMALL, verbosity="quiet", instruments="angle"
    )
    trainer.train()
    assert said(caplog) == []


def test_the_objective_is_named(tmp_path):
    grpo = tiny_grpo_trainer(tmp_path, scale_rewards="none", loss_type="dr_grpo", num_generations=8)
    assert objective_of(grpo) == "GRPO (loss_type=dr_grpo, scale_rewards=none)"
    assert objective_of(tiny_rloo_trainer(tmp_path)) == "RLOO (normalize_advantages=False)"
    right, shown = Verifier(digit_reward), "; the angle shows what training on pass@4 would do"
    named = f"this run trains on {objective_of(grpo)}"
    assert trains_on(grpo, GuardConfig(k=4), right) == f"{named}, which weighs prompts as pass@1 does{shown}"
    assert trains_on(grpo, GuardConfig(k=4, instruments="change"), right) == named
    for k, own in ((4, ""), (2, ", whose own angle to pass@1 is `objective_cosine`")):
        with PassKObjective(grpo, k=k):
            assert trains_on(grpo, GuardConfig(k=4), right) == f"this run trains on pass@{k} (PassKObjective){own}"
    plain = trains_on(tiny_lm_trainer(tmp_path), GuardConfig(k=4), right)
    assert plain == f"this run trains on the loss of Trainer{shown}"


ESTIMATE = ConflictEstimate(
    k=8,
    status="undetermined",
    reason="wide.",
    confidence=0.95,
    threshold=0.0,
    num_prompts=192,
    num_informative=150,
    num_refreshes=3,
)


@pytest.mark.parametrize(
    ("informative", "available", "words"),
    [
        (150, 1000, "raise `probe_prompts` from 64 to 256"),
        (150, 100, "raise `probe_prompts` from 64 to 100"),
        (150, 64, "add prompts to the probe, which has 64, and raise `probe_prompts`"),
        (90, 1000, "choose prompts that are solved sometimes: 90 of 192 have a gradient"),
        (150, 0, "raise `pool_refreshes`, now 3, or pass held-out prompts as `probe`"),
    ],
)
def test_the_next_setting_to_change(informative, available, words):
    estimate = dataclasses.replace(ESTIMATE, num_informative=informative)
    source = SimpleNamespace(probe=range(available), size=64) if available else None
    line = speech.cannot_tell(10, GuardConfig(), estimate.reason, estimate, source)
    assert line == f"passk_guard step 10: the angle is UNDETERMINED: wide; next: {words}"


@pytest.mark.parametrize(
    ("last", "source", "words"),
    [
        (
            400,
            (64, 16),
            "64 x 16 completions is as much work as 4 training steps; there will be one about every 40 steps",
        ),
        (
            100,
            (64, 16),
            "64 x 16 completions is as much work as 4 training steps; 3 refreshes fit into the 100 steps of this run "
            "at overhead=0.1; for 4, set `overhead` to 0.2 or lower `probe_prompts` or `num_samples`",
        ),
        (
            8,
            (16, 8),
            "16 x 8 completions is as much work as 4 training steps; 1 refresh fits into the 8 steps of this run at "
            "overhead=0.1; for 4, set `overhead` to 2",
        ),
        (
            40,
            None,
            "the training batch is as much work as 4 training steps; 1 refresh fits into the 40 steps of this run at "
            "overhead=0.1; for 4, set `overhead` to 0.4",
        ),
    ],
)
def test_what_a_refresh_costs_and_what_fits_into_the_run(last, source, words):
    if source is not None:
        source = SimpleNamespace(probe=range(100), size=source[0], num_samples=source[1])
    account = Account(run=10_000, probe=4_000, refreshes=1)
    line = speech.cadence(10, GuardConfig(), account, source, last)
    assert line == f"passk_guard step 10: a refresh of {words}"


@pytest.mark.parametrize(
    ("alarm", "acting", "has_objective", "settings", "words"),
    [
        ("conflict", "", False, {}, 'before it does, set `mitigation="project"`'),
        ("conflict", "", True, {}, '^set `mitigation="hold"`'),
        ("conflict", "steps", False, {}, "^if pass@1 falls, raise `gamma` above 0.2$"),
        ("losing", "", False, {}, '`mitigation="project"`; to end .* `max_loss=0.05` with `on_loss="stop"`'),
        ("losing", "", False, {"max_loss": 0.1}, 'a run that loses too much, `on_loss="stop"`$'),
        ("losing", "", False, {"on_loss": "stop", "max_loss": 0.1}, '^set `mitigation="project"`$'),
        ("losing", "floor", True, {}, "^raise `floor_gamma` above 0.2 or `floor_max` above 1$"),
        ("losing", "hold", True, {}, "^raise `overhead`, or lower `refresh_steps`"),
        ("blind", "", False, {}, "`failed_refresh_alert`=3"),
    ],
)
def test_an_alarm_says_what_to_do_with_the_settings_name(alarm, acting, has_objective, settings, words):
    mitigator = NoMitigation()
    if acting:
        mitigator = SimpleNamespace(**{"steps": None, "floor": None, "hold": None, acting: object()})
    text = speech.what_to_do(alarm, GuardConfig(**settings), mitigator, has_objective)
    assert re.search(words, text), text
    assert set(re.findall(r"`(\w+)[`=]", text)) <= set(GuardConfig.__dataclass_fields__) | {"PassKObjective"}


def test_one_number_for_the_standing_verdicts():
    memory = Memory()
    outcome, decision = memory.change.outcome, memory.decision

    def status(verdict, found):
        change = dataclasses.replace(memory.change, outcome=dataclasses.replace(outcome, outcome=found))
        return dataclasses.replace(
            memory, decision=dataclasses.replace(decision, verdict=verdict), change=change
        ).status

    assert [status("undetermined", o) for o in ("undetermined", "holding", "gaining", "losing")] == [0, 1, 1, 3]
    assert [status(v, "undetermined") for v in ("clear", "conflict")] == [1, 2]
    assert status("conflict", "holding") == 2


@pytest.mark.parametrize(("n", "k"), [(8, 8), (8, 3), (6, 1), (16, 8)])
def test_the_share_of_prompts_that_count_is_that_of_the_advantages(n, k):
    correct = torch.tensor([[1.0] * c + [0.0] * (n - c) for c in range(n + 1)])
    expected = passk_advantages(correct, k).abs().amax(1).gt(0).double().mean()
    probe = ProbeGram(torch.zeros(2, 2), torch.full((n + 1,), n), torch.arange(n + 1))
    assert probe.share_weighted(k) == float(expected)
