"""Which model families are sketched in full, and how exactly: a table over causal language models of transformers.

Each row is a tiny random model in float64. The exact sketch ("identity") of a padded batch is compared with autograd
over each sample alone, without padding, parameter by parameter:

- covered: share of the trainable scalars that the sketch says it sees;
- largest error: the largest |found - exact| / |exact| of any covered parameter and sample, where |exact| counts as at
  least a thousandth of the sample's whole gradient;
- remark: which parameters are not covered, or why the model is refused.

Models compute norms, routers or positions in float32, so that errors up to 1e-4 count as none. The exit status is 1
if a covered parameter has a larger error, a wrong number without a word, and if fewer than 40 models could be measured.

    python -m benchmarks.families [NAME ...]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4
FEWEST = 40  # families in the whole table
SAMPLES = 4
VOCABULARY = 64
# Fields that configs use under these names. A config gets those that it has.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "dim_model"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dim_ff", "decoder_ffn_dim", "ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 12),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("num_key_value_heads", "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "use_cache": False,
    "sliding_window": 8,
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    covered: float | None
    error: float | None
    remark: str

    @property
    def silent(self) -> bool:
        return self.error is not None and not self.error <= TOLERANCE

    def __str__(self) -> str:
        covered = "" if self.covered is None else f"{self.covered:.1%}"
        error = "" if self.error is None else f"{self.error:.0e}"
        return f"| {self.name} | {covered} | {error} | {self.remark} |"


HEADER = "| model | covered | largest error | remark |\n|---|---|---|---|"


class _Absent(Exception):
    """The installed transformers has no such model, or it needs a library that is not there."""


def causal_lm(model_type: str, experts: str = "eager", dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny random model of that type, every parameter away from its initial value."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        raise _Absent("not in this transformers")
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict().keys() | set(getattr(kind, "attribute_map", {}))
    mla = {"num_key_value_heads": 2} if "kv_lora_rank" in known else {}
    config = kind(**{name: value for name, value in TINY.items() if name in known} | mla | overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        _perturb(model)
    if hasattr(model, "set_experts_implementation"):  # grouped_mm, the default, takes no float64
        model.set_experts_implementation(experts)
    return model


def _perturb(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.2)


def adapted(kind: str, model_type: str = "qwen2", **settings: Any) -> Any:
    """A tiny model with a PEFT adapter, which alone is trained."""
    import peft

    model = peft.get_peft_model(causal_lm(model_type), getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).double()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        _perturb(model)
    return model


ATTENTION = ["q_proj", "v_proj"]
DELTA_NET = {f"linear_{which}": size for which, size in (("num_key_heads", 2), ("num_value_heads", 2))}
DELTA_NET |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
PLAIN = """
    apertus arcee bart bert biogpt bitnet bloom cohere cohere2 cpmant cwm ernie4_5 exaone4 falcon gemma gemma2
    gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox gptj granite helium llama minicpm3 ministral mistral
    modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3 seed_oss
    smollm3 stablelm starcoder2
"""
EXPERTS = """
    afmoe aria_text cohere2_moe deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss
    granitemoe granitemoeshared hunyuan_v1_moe jetmoe llama4_text longcat_flash minimax minimax_m2 mixtral olmoe phimoe
    qwen2_moe qwen3_moe
"""
RECURRENT = "falcon_mamba jamba lfm2 mamba recurrent_gemma rwkv"
FAMILIES: dict[str, Callable[[], Any]] = {
    **{name: partial(causal_lm, name) for name in (PLAIN + EXPERTS + RECURRENT).split()},
    "qwen3_next": partial(causal_lm, "qwen3_next", **DELTA_NET),
    "mamba2": partial(causal_lm, "mamba2", num_heads=4, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "mixtral, batched_mm": partial(causal_lm, "mixtral", experts="batched_mm"),
    "mixtral, grouped_mm, float32": partial(causal_lm, "mixtral", experts="grouped_mm", dtype=torch.float32),
    "qwen2 + LoRA": partial(adapted, "LoraConfig", r=2, target_modules=ATTENTION),
    "qwen2 + DoRA": partial(adapted, "LoraConfig", r=2, target_modules=ATTENTION, use_dora=True),
    "qwen2 + IA3": partial(
        adapted, "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "mixtral + LoRA on experts": partial(
        adapted, "LoraConfig", "mixtral", r=2, target_modules=ATTENTION, target_parameters=["mlp.experts.down_proj"]
    ),
}


def _batch() -> dict[str, Tensor]:
    """Samples of different lengths, padded on the right, as the arguments of `ScoreSketcher.sketch`."""
    generator = torch.Generator().manual_seed(0)
    lengths, prompts = torch.tensor([9, 6, 7, 9][:SAMPLES]), torch.tensor([3, 2, 4, 1][:SAMPLES])
    position = torch.arange(int(lengths.max()))
    attended = position < lengths[:, None]
    tokens = torch.randint(3, VOCABULARY, attended.shape, generator=generator)
    return {
        "input_ids": torch.where(attended, tokens, 0),
        "attention_mask": attended.long(),
        "completion_mask": (attended & (position >= prompts[:, None])).long(),
        "slots": torch.arange(SAMPLES),
    }


def exact(model: Any, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """For each sample, name of each trainable parameter -> grad log pi of the sample alone, without padding."""
    model.eval()
    for tokens, attended, completion, _ in zip(*batch.values(), strict=True):
        ids, counted = tokens[attended.bool()], completion[attended.bool()].bool()
        logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, :-1].double()
        log_p = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        model.zero_grad()
        log_p[counted[1:]].sum().backward()
        yield {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
        }


def first_line(text: str) -> str:
    """Its first line, up to the end of a sentence."""
    return (text.strip().splitlines() or [""])[0].split(". ")[0]


def measure(name: str, make: Callable[[], Any]) -> Row:
    """The row of one family."""
    from passk_guard.sketch import ScoreSketcher
    from passk_guard.utils.errors import GuardError

    batch = _batch()
    try:
        model = make()
        expected = list(exact(model, batch))
    except _Absent as error:
        return Row(name, None, None, str(error))
    except Exception as error:  # a library is missing, or this transformers wants other fields
        return Row(name, None, None, f"does not run: {first_line(str(error))}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is in the row
        try:
            sketcher = ScoreSketcher(model, method="identity")
            rows = sketcher.sketch(**batch, num_slots=SAMPLES)
        except GuardError as error:
            return Row(name, None, None, f"refused: {first_line(str(error))}")
    coverage, worst = sketcher.coverage, (0.0, "")
    for row, gradients in zip(rows, expected, strict=True):
        least = 1e-3 * float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        parts = row.split([g.numel() for g in gradients.values()])
        for (parameter, gradient), part in zip(gradients.items(), parts, strict=True):
            if parameter not in coverage.uncovered:
                error = float((part - gradient.flatten()).norm()) / max(float(gradient.norm()), least)
                if not error <= worst[0]:
                    worst = error, parameter
    remark = f"not covered: {_listed(coverage.uncovered)}" if coverage.uncovered else ""
    row = Row(name, coverage.share, worst[0], remark)
    return replace(row, remark=f"WRONG: {worst[1]}; {remark}") if row.silent else row


def _listed(names: Iterable[str]) -> str:
    """Names without the numbers of layers."""
    return ", ".join(sorted({".".join(part for part in name.split(".") if not part.isdigit()) for name in names}))


def main(names: list[str]) -> int:
    rows = []
    print(HEADER)
    for name, make in FAMILIES.items():
        if not names or name in names:
            rows.append(measure(name, make))
            print(rows[-1], flush=True)
    measured = [row for row in rows if row.error is not None]
    full = sum(row.covered == 1 for row in measured)
    wrong = [row.name for row in measured if row.silent]
    print(f"\n{len(measured)} measured, {full} covered in full, wrong without a word: {', '.join(wrong) or 'none'}")
    return 1 if wrong or (not names and len(measured) < FEWEST) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
