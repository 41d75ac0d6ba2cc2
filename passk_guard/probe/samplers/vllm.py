"""TRL's own calls of vLLM, made so that a probe leaves no trace in training and no rank waits for one that failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.isolation import attributes
from passk_guard.utils.patching import Method, MethodPatch
from passk_guard.utils.ranks import Ranks

logger = logging.getLogger(__name__)

_NOTHING: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "logprob_token_ids": []}
_OWNER = "TRLSampler"


class VLLMCalls:
    """Around the sampling of a TRL trainer with vLLM.

    Args:
        trainer: a GRPOTrainer or RLOOTrainer with `use_vllm`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._known: bool | None = None  # whether vLLM gives the probabilities it sampled with; None: not asked yet
        self._failed: list[Exception] = []
        self._log_probs: list[float] = []

    @contextmanager
    def around(self, *, turns: bool = False) -> Iterator[list[float]]:
        """Yield the list that log mu of each completion is added to, in nats, in the order of the completions.

        It stays empty where vLLM does not give the probabilities it sampled with, and with `turns`: where a completion
        has several, ranks call vLLM a different number of times, and no call is a whole completion. Weights of the
        model are the same bits afterwards: TRL merges adapters to send weights to vLLM, and to take them out again
        rounds. The trainer sends its weights again where they changed or a call failed.
        """
        trainer, engine = self._trainer, self._trainer.vllm_generation
        self._failed, self._log_probs = [], []
        ranks, loaded, done = Ranks(trainer.accelerator.device), trainer._last_loaded_step, False
        adapters = list(_adapters(trainer.model))
        with ExitStack() as stack:
            if getattr(engine, "logprobs", 0) is None:  # RLOO does not ask for them
                stack.enter_context(attributes(engine, {"logprobs": 0}))
            for obj, name, wrap in self._wrappers(engine, adapters, ranks, turns):
                stack.enter_context(MethodPatch(obj, name, wrap, owner=_OWNER))
            try:
                yield self._log_probs
                done = True
            finally:
                if adapters or not done:
                    trainer._last_loaded_step = loaded

    def seed(self, seed: int) -> int:
        """The seed of the first rank of those that share one vLLM: they must all sample the same tokens."""
        engine = self._trainer.vllm_generation
        group = getattr(engine, "tp_group", None)
        if group is None or getattr(engine, "tensor_parallel_size", 1) == 1:
            return seed
        seeds = [seed]
        dist.broadcast_object_list(seeds, src=dist.get_global_rank(group, 0), group=group)
        return seeds[0]

    def _wrappers(
        self, engine: Any, adapters: Sequence[Any], ranks: Ranks, turns: bool
    ) -> Iterator[tuple[Any, str, Callable[[Method], Method]]]:
        if turns:
            yield engine, "sync_weights", _as_they_were(adapters)
            return
        yield engine, "sync_weights", lambda sync: self._caught(_as_they_were(adapters)(sync))
        yield engine, "generate", lambda generate: self._agreed(generate, engine, ranks)
        client = getattr(engine, "vllm_client", None)  # rank 0 alone has one, in server mode
        if client is None:
            return
        yield client, "generate", lambda generate: self._caught(generate, lambda: dict(_NOTHING))
        if hasattr(client, "update_named_params"):
            yield client, "update_named_params", self._sent

    def _caught(self, call: Method, instead: Callable[[], Any] = lambda: None) -> Method:
        """A failure waits until all ranks have come to where they agree on it."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                self._failed.append(error)
                return instead()

        return wrapper

    def _sent(self, send: Method) -> Method:
        """What is sent is gathered from all ranks, tensor by tensor: rank 0 takes part to the end."""

        def wrapper(metadata: Any, parameters: Iterator[Any]) -> Any:
            try:
                return send(metadata, parameters)
            except Exception as error:
                self._failed.append(error)
                return [None for _ in parameters][:0]

        return wrapper

    def _agreed(self, generate: Method, engine: Any, ranks: Ranks) -> Method:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            ranks.together(self._raise_failure)
            if self._known is None:
                self._known = self._processed(engine, ranks)
            result = self._caught(generate)(*args, **kwargs)
            ranks.together(self._raise_failure)
            if self._known and len(result) > 2 and result[2] is not None:
                self._log_probs += _sums(*result[1:])
            return result

        return wrapper

    def _raise_failure(self) -> None:
        if self._failed:
            raise self._failed[0]

    def _processed(self, engine: Any, ranks: Ranks) -> bool:
        """Whether vLLM's log-probabilities are of what it samples from; raw ones are those of temperature 1."""
        mode = None
        try:
            if hasattr(engine, "llm"):
                mode = engine.llm.llm_engine.model_config.logprobs_mode
            elif hasattr(engine, "vllm_client"):
                mode = engine.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        except Exception:  # a server that does not tell, or another TRL or vLLM
            mode = None
        known = mode == "processed_logprobs" or (mode == "raw_logprobs" and self._trainer.temperature == 1.0)
        if getattr(engine, "mode", "colocate") == "server":  # rank 0 alone has asked
            known = bool(ranks.max(int(known)))
        if not known and ranks.index == 0:
            logger.warning(
                "passk_guard: vLLM does not give the probabilities that it samples with (logprobs_mode=%s), so that "
                "its difference from the model is neither measured nor corrected. Start the server with "
                "`--logprobs-mode processed_logprobs`.",
                mode,
            )
        return known


def _sums(completion_ids: Sequence[Sequence[int]], log_probs: Any, token_ids: Any = None) -> list[float]:
    """log mu of each completion: the sum over its tokens of the log-probability of the one sampled.

    Args:
        completion_ids: [B][T]. log_probs: [B][T][1 or more], None for NaN; token_ids: likewise, of which tokens.

    Raises:
        FailedRefresh: a sampled token has none.
    """

    def one(tokens: Sequence[int], found: Sequence[Any], of: Sequence[Sequence[int]] | None) -> float:
        if len(tokens) != len(found):
            raise FailedRefresh(f"vLLM gave {len(found)} log-probabilities for {len(tokens)} tokens")
        places = [0] * len(tokens) if of is None else [ids.index(y) for y, ids in zip(tokens, of, strict=True)]
        chosen = [values[place] for values, place in zip(found, places, strict=True)]
        if None in chosen:
            raise FailedRefresh("vLLM gave no log-probability (NaN) for a token that it sampled")
        return float(sum(chosen))

    of_each = [None] * len(completion_ids) if token_ids is None else token_ids
    return [one(*parts) for parts in zip(completion_ids, log_probs, of_each, strict=True)]


def _adapters(model: nn.Module) -> Iterator[Any]:
    """The layers of PEFT that merge themselves into the layer they lie on."""
    for module in model.modules():
        if hasattr(module, "merged_adapters") and hasattr(module, "get_base_layer"):
            yield module


@contextmanager
def _as_they_were(adapters: Sequence[Any]) -> Iterator[None]:
    """Put the weights under adapters back to the same bits, from copies on the CPU, and what is merged into them."""
    parameters = {id(p): p for layer in adapters for p in layer.get_base_layer().parameters()}.values()
    merged = [(layer, list(layer.merged_adapters)) for layer in adapters]
    with torch.no_grad():
        before = [(part, part.to("cpu", copy=True)) for part in map(_own_part, parameters)]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, copy in before:
                part.copy_(copy)
        for layer, names in merged:
            layer.merged_adapters[:] = names


def _own_part(parameter: Any) -> Tensor:
    """What this rank holds of it, under FSDP2 and ZeRO-3 too."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach()
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()
