"""Samplers: the right distribution, the right bookkeeping, and no trace left in the trainer."""

import copy
import inspect
import logging
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from passk_guard.probe.samplers import BatchTap, GenerateSampler, Sampler, TRLSampler
from passk_guard.utils.errors import FailedRefresh, GuardError
from tests.helpers.tiny import (
    digit_reward,
    enable_checkpointing,
    tiny_chat_rows,
    tiny_grpo_trainer,
    tiny_model,
    tiny_rloo_trainer,
    tiny_rows,
    tiny_tokenizer,
)

TRAINERS = [tiny_grpo_trainer, tiny_rloo_trainer]
EOS = 1


def next_token_probabilities(model, tokenizer, prompt, temperature=1.0):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        return torch.softmax(model.eval()(ids).logits[0, -1].double() / temperature, dim=-1)


def chi_square_is_plausible(tokens, probabilities):
    """Pearson's statistic over tokens expected at least 5 times, the others together; within 5 sd of its mean."""
    expected = probabilities * len(tokens)
    counts = torch.zeros_like(expected)
    for token, count in Counter(tokens).items():
        counts[token] = count
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp_min(1e-9)).sum().item()
    freedom = len(expected) - 1
    return statistic < freedom + 5 * math.sqrt(2 * freedom)


def favouring(token, bonus, **overrides):
    """A model that samples `token` often."""
    model = tiny_model(tie_word_embeddings=False, **overrides)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.bias[token] = bonus
    return model


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"])
def test_generate_samples_the_whole_softmax_whatever_the_models_defaults(kind):
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    defaults = {"top_k": 2, "top_p": 0.3, "temperature": 0.2, "repetition_penalty": 20.0, "min_p": 0.2}
    model.generation_config.update(**defaults, no_repeat_ngram_size=1, min_new_tokens=3)
    sampler = GenerateSampler(model, tokenizer, temperature=1.3, max_new_tokens=1, batch_size=512)
    rows = [{"prompt": "1+2="}, {"prompt": "a longer prompt, 3+4="}]
    samples = sampler.sample(rows, 1500, seed=0)
    for i, row in enumerate(rows):
        tokens = [ids[0] for ids in samples.completion_ids[i * 1500 : (i + 1) * 1500]]
        exact = next_token_probabilities(model, tokenizer, row["prompt"], 1.3)
        assert chi_square_is_plausible(tokens, exact)
        assert not chi_square_is_plausible(tokens, next_token_probabilities(model, tokenizer, row["prompt"], 0.8))


def test_padding_does_not_change_what_is_sampled():
    """At a low temperature the samples are the argmax, with or without a longer neighbour in the batch."""
    tokenizer = tiny_tokenizer(padding_side="right")
    sampler = GenerateSampler(tiny_model(), tokenizer, temperature=1e-4, max_new_tokens=6)
    rows = [{"prompt": "1+2="}, {"prompt": "what is the sum of 3 and 4? "}, {"prompt": "7"}]
    together = sampler.sample(rows, 2, seed=0)
    apart = [sampler.sample([row], 1, seed=1).completion_ids[0] for row in rows]
    assert together.completion_ids == [ids for ids in apart for _ in range(2)]
    assert tokenizer.padding_side == "right"


def test_prompt_major_order_and_contents():
    tokenizer = tiny_tokenizer()
    sampler = GenerateSampler(tiny_model(), tokenizer, max_new_tokens=3, batch_size=4)
    rows = [{"prompt": p} for p in ("1+2=", "10+20=", "x")]
    samples = sampler.sample(rows, 3, seed=0)
    assert len(samples) == 9
    assert samples.prompt_ids == [tokenizer(row["prompt"])["input_ids"] for row in rows for _ in range(3)]
    assert samples.completions == tokenizer.batch_decode(samples.completion_ids, skip_special_tokens=True)
    assert sampler.sample(rows, 3, seed=0) == samples
    assert sampler.sample(rows, 3, seed=1) != samples


def test_a_completion_ends_with_its_first_end_of_sequence():
    tokenizer = tiny_tokenizer(pad_token=None)
    model = favouring(EOS, 4.0, pad_token_id=None)
    samples = GenerateSampler(model, tokenizer, max_new_tokens=12).sample(tiny_rows(2), 16, seed=0)
    ended = [ids for ids in samples.completion_ids if EOS in ids]
    assert len(ended) > 5
    assert all(ids.index(EOS) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 12 for ids in samples.completion_ids if EOS not in ids)
    assert not any("<eos>" in text for text in samples.completions)


def test_ends_of_turn_that_the_model_declares_count():
    model = favouring(10, 6.0)
    model.generation_config.eos_token_id = [EOS, 10]
    samples = GenerateSampler(model, tiny_tokenizer(), max_new_tokens=12).sample(tiny_rows(1), 16, seed=0)
    assert any(ids[-1] == 10 for ids in samples.completion_ids)
    assert all(10 not in ids[:-1] for ids in samples.completion_ids)


def test_conversational_prompts():
    tokenizer = tiny_tokenizer()
    sampler = GenerateSampler(tiny_model(), tokenizer, max_new_tokens=3)
    samples = sampler.sample(tiny_chat_rows(2), 2, seed=0)
    assert tokenizer.decode(samples.prompt_ids[0]) == "<|user|>0+0=<|assistant|>"
    text = tokenizer.decode(samples.completion_ids[3], skip_special_tokens=True)
    assert samples.completions[3] == [{"role": "assistant", "content": text}]


def test_generate_leaves_model_tokenizer_and_generators_alone():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    enable_checkpointing(model)
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    before, generator = traces(model, tokenizer), torch.get_rng_state()
    progress = []
    sampler = GenerateSampler(model, tokenizer, batch_size=4, max_new_tokens=2)
    sampler.on_progress = lambda done, total: progress.append((done, total))
    samples = sampler.sample(tiny_rows(3), 2, seed=0)
    assert progress == [(4, 6), (6, 6)]
    assert traces(model, tokenizer) == before
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(5)
    assert sampler.sample(tiny_rows(3), 2, seed=0) == samples


def test_dropout_is_off_while_sampling_and_an_exception_restores_the_modes():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    sampler = GenerateSampler(model, tiny_tokenizer(), temperature=1e-4, max_new_tokens=4)
    assert len(set(map(tuple, sampler.sample(tiny_rows(1), 8, seed=0).completion_ids))) == 1
    sampler.on_progress = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        sampler.sample(tiny_rows(1), 1, seed=0)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "`temperature` > 0; found 0.0"),
        ({"max_new_tokens": 0}, "found 0 and 64"),
        ({"top_p": 1.5}, "found 1.5"),
        ({"model": torch.nn.Linear(1, 1)}, "found Linear"),
    ],
)
def test_misuse_of_generate(arguments, message):
    with pytest.raises(GuardError, match=message):
        GenerateSampler(**({"model": tiny_model(), "tokenizer": tiny_tokenizer()} | arguments))


def test_adapters_are_sampled_too(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = tiny_grpo_trainer(tmp_path, peft_config=lora, temperature=1e-4)
    tokenizer, rows = trainer.processing_class, tiny_rows(2)
    before = traces(trainer.model, tokenizer)
    samplers = TRLSampler(trainer), GenerateSampler(trainer.model, tokenizer, temperature=1e-4, max_new_tokens=4)
    for sampler in samplers:
        sampler.check_lengths(rows)
    assert samplers[0].sample(rows, 2, seed=0) == samplers[1].sample(rows, 2, seed=0)
    assert traces(trainer.model, tokenizer) == before


def test_tokenizers_that_do_not_suffice():
    model = tiny_model(eos_token_id=None, pad_token_id=None)
    with pytest.raises(GuardError, match=r"Set `tokenizer.pad_token`"):
        GenerateSampler(model, tiny_tokenizer(pad_token=None, eos_token=None))
    sampler = GenerateSampler(tiny_model(), tiny_tokenizer(chat_template=None), max_new_tokens=4)
    sampler.check_lengths(tiny_rows(2))
    with pytest.raises(GuardError, match="chat template"):
        sampler.check_lengths(tiny_chat_rows(2))


def test_prompts_that_do_not_fit(tmp_path):
    rows = [{"prompt": "1"}, {"prompt": "x" * 61}, {"prompt": "x" * 70}]
    message = r"2 of 3 probe prompts do not fit: expected at most 60 tokens \(context 64 - `{}` 4\); found up to 70"
    sampler = GenerateSampler(tiny_model(), tiny_tokenizer(), max_new_tokens=4)
    with pytest.raises(GuardError, match=message.format("max_new_tokens")):
        sampler.check_lengths(rows)
    sampler.check_lengths(rows[:1])
    trl_sampler = TRLSampler(tiny_grpo_trainer(tmp_path))
    with pytest.raises(GuardError, match=message.format("max_completion_length")):
        trl_sampler.check_lengths(rows)
    trl_sampler.check_lengths(rows[:1])
    trl_sampler.check_lengths(tiny_chat_rows(2))


def traces(model, tokenizer):
    """Everything of model and tokenizer that a sampler could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [m.training for m in model.modules()],
        [vars(m).get("gradient_checkpointing") for m in model.modules()],
        [id(vars(m).get("_gradient_checkpointing_func")) for m in model.modules()],
        [len(getattr(m, name)) for m in model.modules() for name in hooks],
        (id(model.generation_config), repr(vars(model.generation_config))),
        repr(model.config),
        [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()],
        (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, tokenizer.chat_template),
    )


def trainer_traces(trainer):
    """The bookkeeping of a TRL trainer, copied."""
    names = ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics", "_step", "_buffered_inputs")
    counts = (trainer.num_generations, trainer.num_generations_eval)
    return copy.deepcopy([vars(trainer).get(name) for name in names]), vars(trainer.state).copy(), counts


@pytest.mark.parametrize("make", TRAINERS)
def test_trl_samples_the_policy(make, tmp_path):
    trainer = make(tmp_path, max_completion_length=1, temperature=0.7, per_device_train_batch_size=500)
    sampler = TRLSampler(trainer)
    samples = sampler.sample([{"prompt": "1+2="}, {"prompt": "12+34="}], 1000, seed=0)
    assert sampler.temperature == 0.7
    for i, prompt in enumerate(("1+2=", "12+34=")):
        tokens = [ids[0] for ids in samples.completion_ids[i * 1000 : (i + 1) * 1000]]
        exact = next_token_probabilities(trainer.model, trainer.processing_class, prompt, 0.7)
        assert chi_square_is_plausible(tokens, exact)


@pytest.mark.parametrize("make", TRAINERS)
@pytest.mark.parametrize("rows", [tiny_rows(3), tiny_chat_rows(3)], ids=["text", "chat"])
def test_trl_gives_what_plain_generate_gives(make, rows, tmp_path):
    trainer = make(tmp_path, temperature=1e-4)
    generate = GenerateSampler(trainer.model, trainer.processing_class, temperature=1e-4, max_new_tokens=4)
    for sampler in (generate, TRLSampler(trainer)):
        assert isinstance(sampler, Sampler)
    assert TRLSampler(trainer).sample(rows, 3, seed=0) == generate.sample(rows, 3, seed=0)


@pytest.mark.parametrize("make", TRAINERS)
def test_trl_leaves_the_trainer_alone(make, tmp_path):
    """In the middle of training, where metrics and buffers are full; checkpointing is on by TRL's default."""
    seen = []

    def probe(trainer):
        sampler = TRLSampler(trainer)
        trainer.model.model.layers[0].eval()
        tokenizer, generator = trainer.processing_class, torch.get_rng_state()
        before = traces(trainer.model, tokenizer), trainer_traces(trainer)
        samples = sampler.sample(tiny_rows(5), 6, seed=0)
        assert len(samples) == 30
        assert equal((traces(trainer.model, tokenizer), trainer_traces(trainer)), before)
        assert torch.equal(torch.get_rng_state(), generator)
        trainer.model.model.layers[0].train()
        seen.append(samples)

    class Prober(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            probe(trainer)

    trainer = make(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trainer.add_callback(Prober())
    trainer.train()
    assert len(seen) == 2
    assert seen[0] != seen[1]  # the policy has moved on


@pytest.mark.parametrize("make", TRAINERS)
def test_training_is_bit_for_bit_the_same_with_and_without(make, tmp_path):
    samples = []

    class Probing(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            samples.append(TRLSampler(self.trainer).sample(tiny_rows(5), 3, seed=state.global_step))

    def train(name, callbacks):
        trainer = make(tmp_path / name, max_steps=3, callbacks=callbacks)
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
        logs = [{k: v for k, v in entry.items() if not is_timing(k)} for entry in trainer.state.log_history]
        return [p.detach().clone() for p in trainer.model.parameters()], logs

    assert equal(train("with", [Probing()]), train("without", []))
    assert len(samples) == 3


def is_timing(key):
    return "time" in key or "per_second" in key


def equal(a, b):
    """Deep equality that knows tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a is b or repr(a) == repr(b)


def test_trl_generates_no_more_at_once_than_training_does(tmp_path, monkeypatch):
    trainer = tiny_grpo_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    sizes, generate = [], trainer._generate_single_turn
    monkeypatch.setattr(
        trainer, "_generate_single_turn", lambda ids, *a, **k: sizes.append(len(ids)) or generate(ids, *a, **k)
    )
    progress = []
    TRLSampler(trainer, on_progress=lambda *p: progress.append(p)).sample(tiny_rows(5), 4, seed=0)
    assert sizes == [8, 8, 4]
    assert progress == [(8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize("make", TRAINERS)
def test_vllm_gets_all_prompts_in_one_call_with_the_probes_count(make, tmp_path, monkeypatch):
    """The engine is a stand-in, for an environment without vLLM; tests/vllm has the real one."""
    trainer = make(tmp_path)
    calls = []

    def generate(prompts, images, num_generations, profiler):
        calls.append((len(prompts), num_generations, trainer.args.report_to))
        return prompts, [[7, EOS] for _ in prompts], [[[0.0], [0.0]] for _ in prompts], None

    engine = SimpleNamespace(generate=generate, sync_weights=lambda: calls.append("sync"))
    for name, value in {"use_vllm": True, "vllm_generation": engine, "_last_loaded_step": -1}.items():
        monkeypatch.setattr(trainer, name, value, raising=False)
    trainer.args.report_to = ["wandb"]
    samples = TRLSampler(trainer).sample(tiny_rows(5), 6, seed=0)
    assert calls == ["sync", (30, 6, [])]
    assert samples.completion_ids == [[7, EOS]] * 30
    assert trainer.num_generations == 4
    assert trainer.args.report_to == ["wandb"]


def test_unsupported_trainers_are_refused(tmp_path, monkeypatch):
    with pytest.raises(GuardError, match=r"found SimpleNamespace, which has no `_tokenize_prompts`.*GenerateSampler"):
        TRLSampler(SimpleNamespace())
    trainer = tiny_grpo_trainer(tmp_path)
    monkeypatch.setattr(trainer, "use_transformers_continuous_batching", True, raising=False)
    with pytest.raises(GuardError, match="without `use_transformers_continuous_batching`"):
        TRLSampler(trainer)
    monkeypatch.undo()
    for row in (
        {"prompt": "x", "image": object()},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": object()}]}]},
    ):
        with pytest.raises(GuardError, match="found images"):
            TRLSampler(trainer).check_lengths([row])


def test_truncated_sampling_is_warned_of(tmp_path, caplog):
    trainer = tiny_grpo_trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        TRLSampler(trainer)
        assert "samples with" not in caplog.text
        trainer.top_k = 20
        TRLSampler(trainer)
    assert "samples with top_k=20" in caplog.text


def test_a_tokenizers_response_template_is_followed(tmp_path):
    """As GRPO does, where the message a reward function sees is more than the decoded text."""
    trainer = tiny_grpo_trainer(tmp_path, model=favouring(EOS, 3.0))
    tokenizer = trainer.processing_class
    by_template = "prefix" in inspect.signature(tokenizer.parse_response).parameters
    if by_template:
        tokenizer.response_template = {
            "defaults": {"role": "assistant"},
            "start_anchor": "<|assistant|>",
            "fields": {"content": {"close_pattern": "<eos>", "content": "text"}},
        }
    else:  # transformers 5.0
        fields = {"content": {"type": "string", "x-regex": r"^(.*?)(?:<eos>|$)"}, "heard": {"const": "yes"}}
        tokenizer.response_schema = {"type": "object", "properties": {"role": {"const": "assistant"}} | fields}
    rows = tiny_chat_rows(2)
    samples = TRLSampler(trainer).sample(rows, 8, seed=0)
    told = {"prefix": samples.prompt_ids[3]} if by_template else {}
    parsed = tokenizer.parse_response(samples.completion_ids[3], **told)
    assert samples.completions[3] == [parsed]
    assert parsed.keys() == {"role", "content"} | (set() if by_template else {"heard"})
    rloo = tiny_rloo_trainer(tmp_path, tokenizer=trainer.processing_class)
    [[message]] = TRLSampler(rloo).sample(rows[:1], 1, seed=0).completions
    assert isinstance(message["content"], str)


@pytest.mark.parametrize("make", TRAINERS)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_the_tap_sees_the_training_batch(make, chat, tmp_path):
    seen, rewarded = [], []

    def half(completions, **_):
        return [0.5] * len(completions)

    def recording(completions, completion_ids, **_):
        rewarded.append((completions, completion_ids))
        return digit_reward(completions)

    rows = tiny_chat_rows(32) if chat else tiny_rows(32)
    trainer = make(
        tmp_path,
        model=favouring(EOS, 3.0),
        reward_funcs=[recording, half],
        train_dataset=Dataset.from_list(rows),
        mask_truncated_completions=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    with BatchTap(trainer, lambda rollouts, rewards: seen.append((rollouts, rewards))):
        trainer.train()
    assert vars(trainer).keys().isdisjoint({"_calculate_rewards", "_generate_and_score_completions"})
    assert len(seen) == 2
    for (rollouts, rewards), (completions, ids) in zip(seen, rewarded, strict=True):
        assert list(rollouts.prompt_index) == [0] * 4 + [1] * 4
        assert (rollouts.num_prompts, rollouts.temperature) == (2, 1.0)
        assert rollouts.completions == completions
        assert rollouts.completion_ids == ids  # also where mask_truncated_completions blanks them
        assert rewards[:, 0].tolist() == digit_reward(completions)
        assert rewards[:, 1].tolist() == [0.5] * 8
        for row, prompt in zip(rollouts.rows, rollouts.prompt_ids, strict=True):
            assert prompt == GenerateSampler(trainer.model, trainer.processing_class)._encode(row["prompt"])
            assert "answer" in row


def test_a_group_that_straddles_ranks_keeps_one_index(tmp_path):
    """Rank 1 of 2 with 6 samples and groups of 4: samples 6..11 of 12."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(process_index=1),
        model=SimpleNamespace(training=True),
        num_generations=4,
        temperature=1.0,
        _calculate_rewards=lambda *_: torch.arange(12.0)[:, None],
    )

    def generate(inputs):
        trainer._calculate_rewards(inputs, None, ["c"] * 6, [[5]] * 6)
        mask = torch.tensor([[0, 1]]).expand(6, 2)
        return {"prompt_ids": torch.tensor([[0, 9]]).expand(6, 2), "prompt_mask": mask}

    trainer._generate_and_score_completions = generate
    seen = []
    with BatchTap(trainer, lambda *a: seen.append(a)):
        trainer._generate_and_score_completions([{"prompt": "x"}] * 6)
        trainer.model.training = False
        trainer._generate_and_score_completions([{"prompt": "x"}] * 6)
    [(rollouts, rewards)] = seen
    assert list(rollouts.prompt_index) == [1, 1, 2, 2, 2, 2]
    assert rollouts.num_prompts == 3
    assert rewards[:, 0].tolist() == [6, 7, 8, 9, 10, 11]
    assert rollouts.prompt_ids == [[9]] * 6
    assert trainer._generate_and_score_completions is generate


def test_a_failing_listener_does_not_stop_training(tmp_path, caplog):
    reasons = iter([FailedRefresh("no signal"), FailedRefresh("no signal"), ValueError("bad"), ValueError("bad")])

    def listener(rollouts, rewards):
        raise next(reasons)

    trainer = tiny_grpo_trainer(tmp_path, max_steps=4)
    with caplog.at_level(logging.WARNING, logger="passk_guard"), BatchTap(trainer, listener):
        trainer.train()
    assert trainer.state.global_step == 4
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("passk_guard")]
    assert messages == [
        "passk_guard: no estimate from the training batch: no signal",
        "passk_guard: no estimate from the training batch: ValueError: bad",
    ]


def test_one_tap_at_a_time(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path)
    with BatchTap(trainer, print), pytest.raises(GuardError, match="already patched by 'BatchTap'"):
        BatchTap(trainer, print).install()
    with BatchTap(trainer, print):
        pass
    with pytest.raises(GuardError, match="found SimpleNamespace"):
        BatchTap(SimpleNamespace(), print)
