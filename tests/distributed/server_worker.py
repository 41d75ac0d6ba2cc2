"""One rank of a TRL trainer on a vLLM server that fails: `python -m tests.distributed.server_worker x FOLDER`.

TRL's generation is the real one. The client, which rank 0 alone has, is a stand-in that answers or raises.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from trl.generation.vllm_generation import VLLMGeneration

from passk_guard.probe.samplers import TRLSampler
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks
from tests.distributed.launch import leave
from tests.helpers.tiny import probe_rows, tiny_grpo_trainer

RANK = int(os.environ["RANK"])


class Client:
    """Of each prompt, n completions of the tokens 7 and 1 with probabilities of a half."""

    def __init__(self):
        self.fails = None

    def generate(self, prompts, n, **_):
        if self.fails == "generate":
            raise ConnectionError("the server is gone")
        count = len(prompts) * n
        logs = [[[-0.5], [-0.25]]] * count
        return {"prompt_ids": prompts, "completion_ids": [[7, 1]] * count, "logprobs": logs}

    def update_named_params(self, metadata, parameters):
        for i, _ in enumerate(parameters):
            if self.fails == "send" and i == 2:
                raise ConnectionError("the server is gone")

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def reset_prefix_cache(self):
        pass


def engine_of(trainer):
    """TRL's generation in server mode, without the start, which asks for vLLM and NCCL."""
    engine = object.__new__(VLLMGeneration)
    settings = {"mode": "server", "model": trainer.model, "accelerator": trainer.accelerator, "min_p": None}
    settings |= {"enable_sleep_mode": False, "_weight_metadata": None, "structured_outputs_regex": None}
    settings |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_completion_length": 4}
    settings |= {"generation_kwargs": {}, "logprobs": 0, "_dist": trainer._dist}
    vars(engine).update(settings | ({"vllm_client": Client()} if RANK == 0 else {}))
    return engine


def outcome(trainer, sampler, case):
    """What one call of the sampler gives, as in a refresh."""
    client = getattr(trainer.vllm_generation, "vllm_client", SimpleNamespace())
    client.fails = case
    tokenize = trainer._tokenize_prompts
    if case == "tokenize" and RANK == 1:
        trainer._tokenize_prompts = lambda prompts: 1 / 0
    trainer._last_loaded_step = -1
    try:
        samples = Ranks(trainer.accelerator.device).together(lambda: sampler.sample(probe_rows(3), 4, RANK))
        return [samples.completion_ids == [[7, 1]] * 12, samples.log_probs == [-0.75] * 12]
    except FailedRefresh as error:
        return [str(error), trainer._last_loaded_step]
    finally:
        trainer._tokenize_prompts = tokenize


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    trainer = tiny_grpo_trainer(folder)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, engine_of(trainer), -1
    sampler = TRLSampler(trainer)
    found = {case: outcome(trainer, sampler, case) for case in ("generate", "send", "tokenize", "none")}
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
    leave()
