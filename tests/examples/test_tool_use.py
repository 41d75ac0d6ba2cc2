"""The example with a tool: TRL reads and writes its trajectories as it does, strict rewards, exact rates, the whole."""

import pytest
import torch

from tests.helpers.tools import SUPPORTED

if not SUPPORTED:
    pytest.skip("this TRL keeps its tools in another way, and is refused", allow_module_level=True)

from trl.chat_template_utils import parse_response

from examples import tool_use
from examples.interference.model import make_model


def test_a_written_trajectory_is_trls_and_nothing_else_is_right(tmp_path):
    tokenizer = tool_use.make_tokenizer()
    model = make_model(tokenizer, 0, hidden=16, layers=1, positions=48)
    trainer = tool_use.make_trainer(model, tmp_path, seed=0, steps=1, prompts=1)
    row = next(row for row in tool_use.make_prompts("test", 40, 0) if row["kind"] == "hard")
    digits = tool_use.look(row["name"])
    assert row["answer"] == "".join(sorted(digits, reverse=True))
    trajectory = (row["prompt"][0]["content"], row["name"], digits, row["answer"])
    ids, mask = (part[0].tolist() for part in tool_use.encode(tokenizer, [trajectory]))

    prompt = trainer._tokenize_prompts([row["prompt"]])[0][0]
    turns = tool_use.messages(row["name"], digits, row["answer"])
    result = trainer._get_tool_suffix_ids(turns[1:2])
    start, end = ids.index(tokenizer.eos_token_id) + 1, len(ids)
    assert ids[: len(prompt)] == prompt
    assert ids[start : start + len(result)] == result
    assert mask == [0] * len(prompt) + [1] * (start - len(prompt)) + [0] * len(result) + [1] * 5
    assert end - len(prompt) == tool_use.LENGTH

    def parsed(before, text):
        return parse_response(tokenizer, tokenizer(text)["input_ids"], prefix=before, tools=[tool_use.look])

    call = f"look(name={row['name']})<eos>"
    assert [parsed(prompt, call), turns[1], parsed(ids[: start + len(result)], row["answer"] + "<eos>")] == turns
    others = [
        [turns[2]],
        [*turns[:2], {**turns[2], "content": row["answer"][::-1]}],
        [*turns[:2], {**turns[2], "content": row["answer"] + "0"}],
        [parsed(prompt, "5" + call), *turns[1:]],
        [parsed(prompt, call.replace(")", "q)")), *turns[1:]],
    ]
    columns = {name: [row[name]] * 6 for name in ("name", "answer")}
    assert tool_use.correct([turns, *others], **columns) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]

    rates = tool_use.ExactRates(trainer, [row], 1)
    rates.measure(0)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    p = float(sum(log_p[t - 1, ids[t]] for t in range(len(ids)) if mask[t]).exp())
    assert rates.records[0][1] == pytest.approx(p, rel=1e-3)


def test_quick_run(tmp_path, capsys):
    found = tool_use.main(["--quick", "--out", str(tmp_path)])
    assert [[record["step"] for record in records] for records in found.values()] == [[0, 4], [0, 4]]
    assert found["observe"][0] == found["hold"][0]
    printed = capsys.readouterr().out
    assert "A trajectory, its mask" in printed
    assert printed.count("the probe uses the run's tools (look)") == 2
    assert "hold pass@1 at its start" in printed
