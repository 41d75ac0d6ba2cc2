"""GRPO on pass@4, and one line that watches it. Nothing is downloaded; a CPU takes half a minute."""

import random

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

import passk_guard

set_seed(0)
backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=14, eos_token_id=1, pad_token_id=0, **shape))
sums = random.sample([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(20) for b in range(20)], 400)


def correct(completions, answer, **_):
    return [float(right[-1] in text) for text, right in zip(completions, answer, strict=True)]


small = {"max_steps": 80, "logging_steps": 40, "per_device_train_batch_size": 128, "max_completion_length": 4}
quiet = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
args = GRPOConfig("out", learning_rate=5e-4, scale_rewards="none", loss_type="dr_grpo", **small, **quiet)
trainer = GRPOTrainer(model, correct, args, Dataset.from_list(sums[:200]), processing_class=tokenizer)
passk_guard.watch(trainer, sums[200:], correct, k=4, num_samples=8, probe_prompts=64, overhead=0.3)
with passk_guard.PassKObjective(trainer, k=4):
    trainer.train()
