"""Sampling through a TRL trainer's own generation, so that vLLM setups work unchanged."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from passk_guard.probe.records import context_length
from passk_guard.probe.samplers.protocol import Samples, refuse_misfits
from passk_guard.probe.samplers.trajectories import Trajectories, joined
from passk_guard.probe.samplers.vllm import VLLMCalls
from passk_guard.utils.errors import GuardError
from passk_guard.utils.isolation import attributes, sampling_mode
from passk_guard.utils.private_api import is_trl, requires
from passk_guard.utils.ranks import Ranks
from passk_guard.utils.text import brief

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
_REMEDY = "Pass `sampler=GenerateSampler(model, tokenizer, ...)` or your own sampler."


class TRLSampler:
    """Sample as `GRPOTrainer` or `RLOOTrainer` samples its training batch: same engine, same settings.

    The trainer's metrics, logs, step counters, generation config and module flags are left alone.

    Args:
        trainer: a GRPOTrainer or RLOOTrainer, on transformers or vLLM generation.
        on_progress: called with (completions done, completions in all) after each call of the engine.
        tool_timeout: seconds for a call of a tool or the reset of an environment, where the trainer has them.

    Raises:
        GuardError: another trainer; or continuous batching, whose generation changes the model.
    """

    needs = requires(
        "trl",
        "GRPOTrainer or RLOOTrainer",
        "held-out probes sampled by a TRL trainer",
        "pass `sampler=GenerateSampler(model, tokenizer, ...)` or your own sampler",
        _tokenize_prompts="prompts as token ids, as in training",
        _generate="its module tells how completions are parsed; it makes those of several turns",
        _generate_single_turn="completions, by the trainer's own engine",
        temperature="of the sampling, which the score vectors are taken at",
        use_vllm="vLLM schedules by itself, and has its own limit",
        max_completion_length="what a prompt must leave room for",
    )

    vllm_needs = requires(
        "trl",
        "GRPOTrainer or RLOOTrainer with use_vllm",
        "held-out probes sampled by vLLM",
        "pass `sampler=GenerateSampler(model, tokenizer, ...)` or your own sampler",
        vllm_generation="its `generate` and `sync_weights`, called by the trainer",
        _last_loaded_step="the step whose weights vLLM has",
    )

    def __init__(
        self,
        trainer: Any,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        tool_timeout: float | None = None,
    ) -> None:
        _refuse(trainer)
        self._vllm: VLLMCalls | None = None
        self.trainer = trainer
        self._trajectories = Trajectories.of(trainer, tool_timeout)
        self.on_progress = on_progress
        self._halvings = 0
        _check_sampling(trainer)

    @property
    def temperature(self) -> float:
        """The trainer's sampling temperature."""
        return float(self.trainer.temperature)

    def check_lengths(self, rows: Sequence[Row]) -> None:
        """Raise GuardError when a prompt holds images, is empty, or leaves no room for `max_completion_length`."""
        if any(_has_images(row) for row in rows):
            raise GuardError(f"Expected probe prompts of text; found images. {_REMEDY}")
        if self._trajectories is not None:
            ids: Sequence[Sequence[int]] = self._trajectories.tokenize(rows)
        else:
            ids, _, _ = self.trainer._tokenize_prompts([copy.deepcopy(row["prompt"]) for row in rows])
        limits = [context_length(self.trainer.accelerator.unwrap_model(self.trainer.model))]
        if self.trainer.use_vllm:
            limits.append(getattr(self.trainer.args, "vllm_max_model_length", None))
        context = min((limit for limit in limits if limit is not None), default=None)
        longest = self.trainer.max_completion_length
        refuse_misfits([len(p) for p in ids], context, longest, "max_completion_length")

    def sample(self, rows: Sequence[Row], num_samples: int, seed: int) -> Samples:
        """Sample n = `num_samples` completions of each of m rows.

        Every rank calls with the same number of rows. With transformers, and with vLLM in this process, the same
        arguments give the same samples. A vLLM server has a random state of its own.

        Returns:
            Samples of m * n entries, prompt-major; with vLLM's log-probabilities where it gives them and a completion
            is one turn.

        Raises:
            FailedRefresh: on all ranks, when a call of vLLM failed on one.
        """
        if self._trajectories is not None:
            return self._sample_turns([row for row in rows for _ in range(num_samples)], num_samples, seed)
        prompts = [copy.deepcopy(row["prompt"]) for row in rows for _ in range(num_samples)]
        size = self._completions_per_call(len(prompts))
        prompt_ids: list[list[int]] = []
        completion_ids: list[list[int]] = []
        with self._undisturbed(num_samples, seed) as log_probs:
            for start in range(0, len(prompts), size):
                ids, images, fields = self._tokenize(prompts[start : start + size])
                completion_ids += [list(c) for c in self._generate(ids, images, fields, num_samples)]
                prompt_ids += [list(p) for p in ids]
                if self.on_progress is not None:
                    self.on_progress(len(completion_ids), len(prompts))
        completions = self._decode(prompts, prompt_ids, completion_ids)
        return Samples(prompt_ids, completion_ids, completions, log_probs=log_probs or None)

    def _tokenize(self, prompts: list[Any]) -> tuple[Any, Any, Any]:
        if not self.trainer.use_vllm:
            return self.trainer._tokenize_prompts(prompts)
        # A rank that failed here would not come to where all of them call vLLM.
        return Ranks(self.trainer.accelerator.device).together(lambda: self.trainer._tokenize_prompts(prompts))

    def _sample_turns(self, rows: list[Row], num_samples: int, seed: int) -> Samples:
        """One trajectory of each of these rows."""
        assert self._trajectories is not None
        size, parts = self._completions_per_call(len(rows)), list[Samples]()
        with self._undisturbed(num_samples, seed):
            for start in range(0, len(rows), size):
                parts.append(self._trajectories.sample(rows[start : start + size]))
                if self.on_progress is not None:
                    self.on_progress(min(start + size, len(rows)), len(rows))
        return joined(parts)

    def finish(self) -> None:
        """Close the environments of a refresh."""
        if self._trajectories is not None:
            self._trajectories.close()

    def _completions_per_call(self, total: int) -> int:
        """What training generates at once, which is known to fit in memory; vLLM schedules by itself."""
        if self.trainer.use_vllm:
            return max(total, 1)
        args = self.trainer.args
        return max(1, int(args.per_device_train_batch_size * args.steps_per_generation) >> self._halvings)

    def sample_fewer(self) -> bool:
        """Generate half as many completions at once from here on; False when it is one already, or vLLM decides."""
        if self.trainer.use_vllm or self._completions_per_call(0) <= 1:
            return False
        self._halvings += 1
        return True

    @contextmanager
    def _undisturbed(self, num_samples: int, seed: int) -> Iterator[list[float]]:
        """Yield the list of vLLM's log-probabilities, empty without vLLM."""
        # RLOO reads the number of completions per prompt from itself, by mode; GRPO gets it as an argument.
        counts = {"num_generations": num_samples, "num_generations_eval": num_samples}
        with ExitStack() as stack:
            log_probs: list[float] = []
            if self.trainer.use_vllm:
                self._vllm = self._vllm or VLLMCalls(self.trainer)
                seed, log_probs = (
                    self._vllm.seed(seed),
                    stack.enter_context(self._vllm.around(turns=self._trajectories is not None)),
                )
            stack.enter_context(sampling_mode(self.trainer.model, seed))
            stack.enter_context(attributes(self.trainer, counts))
            # TRL's profiling would add the probe's time to the run's own, and move the tracker's step.
            stack.enter_context(attributes(self.trainer.args, {"report_to": []}))
            yield log_probs

    def _generate(self, prompt_ids: Any, images: Any, fields: Any, num_samples: int) -> list[list[int]]:
        # The class has the signature, which a wrapper set on the instance may hide.
        takes = _takes(type(self.trainer)._generate_single_turn, "num_generations")
        count = {"num_generations": num_samples} if takes else {}
        result = self.trainer._generate_single_turn(prompt_ids, images, fields, **count)
        return list(result[0] if isinstance(result, tuple) else result)  # GRPO adds log-probabilities

    def _decode(self, prompts: list[Any], prompt_ids: list[list[int]], ids: list[list[int]]) -> list[Any]:
        """As `_generate` of the trainer does: a text, or one assistant message."""
        processor = self.trainer.processing_class
        if not prompts or isinstance(prompts[0], str):
            return list(processor.batch_decode(ids, skip_special_tokens=True))
        if (parse := _response_parser(self.trainer)) is not None:
            return [[parse(c, p)] for c, p in zip(ids, prompt_ids, strict=True)]
        texts = processor.batch_decode(ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]


def _refuse(trainer: Any) -> None:
    if is_trl(trainer):
        TRLSampler.needs.check(trainer)
        if trainer.use_vllm:
            TRLSampler.vllm_needs.check(trainer)
    needed = ("_tokenize_prompts", "_generate_single_turn", "_generate", "temperature", "use_vllm")
    if missing := [name for name in needed if not hasattr(trainer, name)]:
        raise GuardError(
            f"Expected a GRPOTrainer or RLOOTrainer of trl >= 1.0; found {type(trainer).__name__}, which has no "
            f"`{missing[0]}`. {_REMEDY}"
        )
    unsupported = {
        "use_transformers_continuous_batching": "it casts the trained weights in place",
        "use_transformers_paged": "it casts the trained weights in place",  # the same in trl 1.0
    }
    for name, why in unsupported.items():
        if getattr(trainer, name, None):
            raise GuardError(f"Expected a trainer without `{name}` ({why}); found one. {_REMEDY}")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), (None, 1.0)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff"), (None, 0.0)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "min_new_tokens"), (None, 0)),
    **dict.fromkeys(("suppress_tokens", "bad_words_ids", "bad_words", "logit_bias", "allowed_token_ids"), (None,)),
    "top_k": (None, 0, -1),
    "num_beams": (None, 1),
    "do_sample": (None, True),
    "min_tokens": (None, 0),
}
_STRUCTURED = ("vllm_structured_outputs_regex", "vllm_guided_decoding_regex")


def _check_sampling(trainer: Any) -> None:
    """Warn of what makes the policy sampled another than the softmax; refuse another temperature than the trainer's."""
    given = dict(getattr(trainer.args, "generation_kwargs", None) or {})
    temperature = given.get("temperature", trainer.temperature)
    if temperature != trainer.temperature:
        raise GuardError(
            f"Expected the temperature in `temperature` of the trainer's arguments, at which scores are taken; found "
            f"{temperature} in `generation_kwargs` and {trainer.temperature} there. Set `temperature={temperature}` "
            "there and take it out of `generation_kwargs`."
        )
    # transformers fills what the trainer does not set from the model's own generation config; vLLM does not read it.
    model = None if trainer.use_vllm else trainer.accelerator.unwrap_model(trainer.model)
    defaults = getattr(model, "generation_config", None)
    found = {name: given.get(name, getattr(trainer, name, getattr(defaults, name, None))) for name in _NEUTRAL}
    found = {name: value for name, value in found.items() if value not in _NEUTRAL[name]}
    found |= {name: value for name in _STRUCTURED if (value := getattr(trainer.args, name, None)) is not None}
    if "structured_outputs" in given:
        found["structured_outputs"] = given["structured_outputs"]
    if found:
        logger.warning(
            "passk_guard: the trainer samples with %s. Score vectors are taken of the whole softmax, so the "
            "conflict is measured for a policy that differs from the one sampled; set them to their neutral values.",
            ", ".join(f"{name}={brief(value)}" for name, value in found.items()),
        )


def _has_images(row: Row) -> bool:
    if row.get("image") is not None or row.get("images"):
        return True
    contents = [] if isinstance(row["prompt"], str) else [message["content"] for message in row["prompt"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _response_parser(trainer: Any) -> Callable[[list[int], list[int]], Any] | None:
    """(completion, prompt) -> message, where the trainer itself would parse by the tokenizer's response schema."""
    processor = trainer.processing_class
    # trl 1.0 has no `_tokenizer`, and parses where the processing class is a tokenizer and no processor that holds one.
    tokenizer: Any = getattr(trainer, "_tokenizer", None if hasattr(processor, "tokenizer") else processor)
    schemas = (getattr(tokenizer, "response_template", None), getattr(tokenizer, "response_schema", None))
    # GRPO's `_generate` knows this function and RLOO's does not, which decodes to plain text.
    parse = inspect.unwrap(type(trainer)._generate).__globals__.get("parse_response")
    if parse is None or all(schema is None for schema in schemas):
        return None
    if not _takes(parse, "prefix"):
        return lambda completion, _: parse(tokenizer, completion)
    return lambda completion, prompt: parse(tokenizer, completion, prefix=prompt)
