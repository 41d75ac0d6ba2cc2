"""Sampling with `model.generate`, for any causal LM of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from passk_guard.probe.passes import tolerance
from passk_guard.probe.records import context_length, limits_of
from passk_guard.probe.samplers.protocol import Samples, refuse_misfits
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.isolation import sampling_mode
from passk_guard.utils.ranks import Ranks, is_sharded

Row = Mapping[str, Any]
_TRIED = 14  # tokens of two prompts in the trial of copied caches, 9 and 5


class GenerateSampler:
    """Sample from softmax(logits / temperature) with `model.generate`, independent of the model's own defaults.

    The samples of a prompt share one pass over it: its cache is copied for each. Where that does not give the same
    logits, found by trying it once, each sample has a pass of its own.

    Args:
        model: a causal LM, or a wrapper that holds one as `.module`.
        tokenizer: its tokenizer, or a processor that holds one; needs a chat template for conversational prompts.
        temperature: of the softmax, > 0.
        max_new_tokens: longest completion, in tokens.
        batch_size: completions generated at once. A count and not a number of tokens, since ranks that hold
            parts of one model must all run the same number of batches.
        top_p: nucleus; None for none. Scores are taken of the whole softmax, so anything else is a mismatch.
        chat_template_kwargs: passed to `apply_chat_template`, e.g. {"enable_thinking": False}.
        on_progress: called with (completions done, completions in all) after each batch.

    Raises:
        GuardError: an argument out of its range, a model that cannot generate, a tokenizer with neither a
            padding nor an end-of-sequence token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        batch_size: int = 64,
        top_p: float | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model if hasattr(model, "generate") else getattr(model, "module", model)
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.top_p = top_p
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.on_progress = on_progress
        self._refuse_misuse()
        self._eos = _eos_ids(self.model, self.tokenizer)
        self._copies: bool | None = None  # whether caches are copied; None: not tried yet
        pad = self.tokenizer.pad_token_id
        self._pad: int = self._eos[0] if pad is None else pad

    def _refuse_misuse(self) -> None:
        if not hasattr(self.model, "generate"):
            raise GuardError(
                f"Expected a model with `generate`; found {type(self.model).__name__}. Pass a causal LM of "
                "transformers, or your own `sampler`."
            )
        if not self.temperature > 0:
            raise GuardError(
                f"Expected `temperature` > 0; found {self.temperature}. Greedy decoding has no score vectors: "
                "pass the temperature of training."
            )
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise GuardError(
                f"Expected `max_new_tokens` and `batch_size` >= 1; found {self.max_new_tokens} and {self.batch_size}."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GuardError(f"Expected `top_p` in (0, 1] or None; found {self.top_p}.")
        if self.tokenizer.pad_token_id is None and not _eos_ids(self.model, self.tokenizer):
            raise GuardError(
                "Expected a tokenizer with a padding or an end-of-sequence token; found neither. "
                "Set `tokenizer.pad_token`."
            )

    def check_lengths(self, rows: Sequence[Row]) -> None:
        """Raise GuardError when a prompt is empty or longer than max_position_embeddings - max_new_tokens.

        Also when prompts are conversational and the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None and any(not isinstance(row["prompt"], str) for row in rows):
            raise GuardError(
                "Expected a tokenizer with a chat template, for conversational prompts; found none. Set "
                "`tokenizer.chat_template` or pass the prompts as texts."
            )
        lengths = [len(self._encode(row["prompt"])) for row in rows]
        refuse_misfits(lengths, context_length(self.model), self.max_new_tokens, "max_new_tokens")

    def sample(self, rows: Sequence[Row], num_samples: int, seed: int) -> Samples:
        """Sample n = `num_samples` completions of each of m rows; the same arguments give the same samples.

        Returns:
            Samples of m * n entries, prompt-major.

        Raises:
            FailedRefresh: the model's logits are not finite.
        """
        encoded = [self._encode(row["prompt"]) for row in rows]
        prompt_ids = [ids for ids in encoded for _ in range(num_samples)]
        if self._copies is None and num_samples > 1:
            self._copies = self._try_copies()
        completion_ids = self._generate(prompt_ids, seed)
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        chats = [not isinstance(row["prompt"], str) for row in rows for _ in range(num_samples)]
        completions = [
            [{"role": "assistant", "content": text}] if chat else text for text, chat in zip(texts, chats, strict=True)
        ]
        return Samples(prompt_ids, completion_ids, completions)

    def sample_fewer(self) -> bool:
        """Generate half as many completions at once from here on; False when it is one already."""
        if self.batch_size <= 1:
            return False
        self.batch_size //= 2
        return True

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        encoded = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
        )
        return list(encoded["input_ids"])

    def _generate(self, prompt_ids: list[list[int]], seed: int) -> list[list[int]]:
        """Tokens sampled after each prompt. Prompts of like length share a batch, to spare padding."""
        completions: list[list[int]] = [[] for _ in prompt_ids]
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]), reverse=True)
        config, finite = self._config(), FiniteLogits()
        with sampling_mode(self.model, seed):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                prompts = [prompt_ids[i] for i in batch]
                output = self._call(prompts, config, bool(self._copies), LogitsProcessorList([finite]))
                for i, ids in zip(batch, output.tolist(), strict=True):
                    completions[i] = _until_eos(ids, self._eos)
                if self.on_progress is not None:
                    self.on_progress(min(start + self.batch_size, len(order)), len(order))
        finite.check()
        return completions

    def _call(self, prompts: list[list[int]], config: GenerationConfig, copies: bool, processors: Any = None) -> Any:
        """Tokens [b, new] after each prompt, or with `return_dict_in_generate` what `generate` returns."""
        width = max(2 if copies else 1, *map(len, prompts))  # every rank has something to read ahead
        input_ids, mask = _left_pad(prompts, self._pad, self.model.device, width)
        cache = {"past_key_values": self._read_once(prompts, width)} if copies else {}
        output = self.model.generate(
            input_ids=input_ids, attention_mask=mask, generation_config=config, logits_processor=processors, **cache
        )
        return output if config.return_dict_in_generate else output[:, width:]

    def _read_once(self, prompts: list[list[int]], width: int) -> DynamicCache:
        """The cache of all tokens but the last of each prompt, from one pass over each different one."""
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        ids, mask = _left_pad(list(map(list, places)), self._pad, self.model.device, width)
        ids, mask, cache = ids[:, :-1], mask[:, :-1], DynamicCache(config=self.model.config)
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
        )
        cache.batch_select_indices(torch.tensor([places[tuple(prompt)] for prompt in prompts], device=ids.device))
        return cache

    def _try_copies(self) -> bool:
        """Whether two random prompts, two samples each, get the logits from copied caches that they get without."""
        limits = limits_of(self.model)
        if limits["vocabulary"] is None or (limits["context"] or _TRIED) < _TRIED:
            return False
        ids = torch.randint(limits["vocabulary"], (_TRIED,), generator=torch.Generator().manual_seed(0)).tolist()
        config, logits = self._config(), list[Tensor]()
        config.update(max_new_tokens=2, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
        try:
            for copies in (False, True):
                with sampling_mode(self.model, seed=0):
                    found = self._call([ids[:9], ids[:9], ids[9:], ids[9:]], config, copies)
                logits.append(torch.stack(found.logits).double())
        except Exception:  # whatever a model makes of a cache that it did not fill itself
            return self._agreed(False)
        plain, copied = logits
        error, effect = copied - plain, plain[0, 0] - plain[0, 2]
        return self._agreed(bool(error.square().mean().sqrt() <= tolerance(self.model) * effect.square().mean().sqrt()))

    def _agreed(self, right: bool) -> bool:
        """The same answer on all ranks that hold parts of one model, and so generate in step; else this rank's own."""
        if not is_sharded(self.model):
            return right
        return not Ranks(self.model.device).max(int(not right))

    def _config(self) -> GenerationConfig:
        """Plain sampling. `generate` fills what is None from the model's own config, so all is spelled out."""
        return GenerationConfig(
            do_sample=True,
            num_beams=1,
            temperature=self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0,
            min_p=0.0,
            typical_p=1.0,
            epsilon_cutoff=0.0,
            eta_cutoff=0.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_new_tokens=0,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=1,
            return_dict_in_generate=False,
            use_cache=True,
            pad_token_id=self._pad,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self._eos or None,
            disable_compile=True,
        )


class FiniteLogits(LogitsProcessor):
    """Replace logits that are NaN or +inf by 0 and remember that there was one; finite ones stay as they are.

    Sampling a token from NaN raises on a CPU and ends the process on a GPU. A rank that stops within a generation
    leaves the others waiting wherever weights are sharded. So the generation continues, and `check` raises at its end.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Finite scores [B, V] of the next token."""
        bad = scores.isnan() | scores.isposinf()
        found = bad.any()
        self._bad = found if self._bad is None else self._bad | found
        return torch.where(bad, torch.zeros_like(scores), scores)

    def check(self) -> None:
        """Raise FailedRefresh when a logit was not finite since this was made."""
        if self._bad is not None and bool(self._bad):
            raise FailedRefresh("the model's logits are not finite: completions cannot be sampled from them")


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and those the model declares (end of turn)."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, (list, tuple)) else [declared]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *declared) if i is not None))


def _left_pad(prompts: list[list[int]], pad: int, device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask [b, width], prompts at the right edge."""
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until_eos(ids: list[int], eos: Sequence[int]) -> list[int]:
    """The tokens up to and with the first end-of-sequence token."""
    end = next((position for position, token in enumerate(ids) if token in eos), len(ids) - 1)
    return ids[: end + 1]
