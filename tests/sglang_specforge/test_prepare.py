"""Conversations into tokens: every layout, loss masks by the template's marks and without them, what is skipped."""

import json
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from sglang_specforge.checkpoint import read_tensors
from sglang_specforge.cli import app
from sglang_specforge.prepare.conversations import Skipped, to_messages
from sglang_specforge.prepare.tokens import ChatTokens
from sglang_specforge.prepared import PreparedError, PreparedFile

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_target"
TURNS = [("user", "def f(x):"), ("assistant", "return x"), ("user", "more"), ("assistant", "no")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
UNMARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As templates do that leave out what was thought in earlier turns.
FORGETFUL = UNMARKED.replace("m['content']", "m['content'] if loop.last else m['content'][:2]")


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human" if r == "user" else "gpt", "value": c} for r, c in TURNS]},
        {"data": [content for _, content in TURNS]},
        {"messages": MESSAGES},
    ],
    ids=["sharegpt", "ultrachat", "messages"],
)
def test_every_layout_gives_the_same_messages(row):
    assert to_messages(row, "auto") == MESSAGES


def test_rows_of_no_layout_are_skipped_by_reason():
    with pytest.raises(Skipped, match="no known layout"):
        to_messages({"prompt": "x"}, "auto")
    with pytest.raises(Skipped, match="role 'narrator' is unknown"):
        to_messages({"messages": [{"role": "narrator", "content": "x"}]}, "auto")


def learnt(tokenizer, ids, mask):
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize("template", [None, UNMARKED])
def test_assistants_turns_are_learnt_whether_the_template_marks_them_or_not(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    ids, mask = ChatTokens(tokenizer, "all").encode(MESSAGES)
    assert learnt(tokenizer, ids, mask) == "return x</s>no</s>"
    ids, mask = ChatTokens(tokenizer, "last").encode(MESSAGES)
    assert learnt(tokenizer, ids, mask) == "no</s>"
    assert "return x" in tokenizer.decode(ids)


def test_a_template_that_renders_turns_differently_later_is_found_out(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(Skipped, match="renders a turn differently once others follow"):
        ChatTokens(tokenizer, "all").encode(MESSAGES)


def prepare(tmp_path, rows, *options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["prepare-data", tmp_path / "rows.jsonl", "--out", tmp_path / "out.parquet", "--tokenizer", TOKENIZER]
    return CliRunner().invoke(app, [str(part) for part in (*command, *options)])


def test_the_command_writes_sequences_and_reports_what_it_skipped(tmp_path, tokenizer):
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES}, {"messages": MESSAGES[:1]}, {"messages": MESSAGES * 9}]
    done = prepare(tmp_path, rows, "--max-tokens", 100)
    assert done.exit_code == 0, done.output
    (only,) = PreparedFile(tmp_path / "out.parquet")
    assert learnt(tokenizer, only.input_ids, only.loss_mask) == "return x</s>no</s>"
    for reason in ("the same as another", "no assistant's turn", "longer than 100 tokens"):
        assert f"1: {reason}" in done.output
    assert "draft vocabulary" in done.output


def test_a_file_that_is_not_there_and_one_of_another_kind_are_named(tmp_path):
    done = CliRunner().invoke(
        app, ["prepare-data", "no.jsonl", "--out", str(tmp_path / "o"), "--tokenizer", str(TOKENIZER)]
    )
    assert done.exit_code == 2
    assert "no.jsonl is not there" in done.output
    (tmp_path / "o.parquet").write_text("nothing")
    with pytest.raises(PreparedError, match=r"o\.parquet is no Parquet file"):
        PreparedFile(tmp_path / "o.parquet")


def test_regenerated_answers_are_the_targets_tokens_and_are_asked_for_once(tmp_path, monkeypatch, tokenizer):
    asked, broken = [], [3]

    def post(client, path, json):
        asked.append(json["input_ids"])
        if len(asked) == broken[0]:
            raise httpx.ConnectError("gone")
        answer = [20 + len(asked), 30, 1]
        return httpx.Response(200, json={"output_ids": answer}, request=httpx.Request("POST", "http://s/generate"))

    monkeypatch.setattr(httpx.Client, "post", post)
    rows = [{"messages": MESSAGES}, {"messages": [{"role": "user", "content": "something else entirely"}, MESSAGES[1]]}]
    stopped = prepare(tmp_path, rows, "--regenerate", "http://s", "--concurrency", 1)
    assert stopped.exit_code == 2
    assert "is kept in" in stopped.output
    assert not (tmp_path / "out.parquet").exists()

    done = prepare(tmp_path, rows, "--regenerate", "http://s", "--concurrency", 1)
    assert done.exit_code == 0, done.output
    assert len(asked) == 4  # two answers, one that failed, and its second try
    first, second = PreparedFile(tmp_path / "out.parquet")
    assert first.input_ids[-3:] == [22, 30, 1]
    assert first.loss_mask[-3:] == [True] * 3
    assert sum(first.loss_mask) > 3  # the first turn is learnt too
    assert second.input_ids[-3:] == [24, 30, 1]
    assert not (tmp_path / "out.parquet.answers.jsonl").exists()


def test_a_draft_vocabulary_is_the_datas_most_frequent_tokens(tmp_path, tokenizer):
    assert prepare(tmp_path, [{"messages": MESSAGES}]).exit_code == 0
    (only,) = PreparedFile(tmp_path / "out.parquet")
    made = CliRunner().invoke(
        app,
        ["init-draft", str(TOKENIZER), str(tmp_path / "draft"), "--draft-vocab-size", "16", "--recipe", "eagle3.1",
         "--counts-from", str(tmp_path / "out.parquet")],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "16 of 1024 tokens hold 100.00% of" in made.output
    tensors = read_tensors(tmp_path / "draft")
    known = set((tensors["d2t"] + torch.arange(16)).tolist())
    assert {i for i, m in zip(only.input_ids, only.loss_mask, strict=True) if m} <= known
    assert "fc_norm.2.weight" in tensors
