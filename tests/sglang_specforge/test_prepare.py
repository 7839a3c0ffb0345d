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
from sglang_specforge.prepare.conversations import Conversation, Skipped, to_conversation
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
FORGETFUL = UNMARKED.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else m['content'][:2])")


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
    assert to_conversation(row, "auto") == Conversation(MESSAGES)


def test_rows_of_no_layout_are_skipped_by_reason():
    with pytest.raises(Skipped, match="no known layout"):
        to_conversation({"prompt": "x"}, "auto")
    with pytest.raises(Skipped, match="role 'narrator' is unknown"):
        to_conversation({"messages": [{"role": "narrator", "content": "x"}]}, "auto")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": ["a", "b"]}, "a turn is no object"),
        ({"messages": "hello"}, "messages is no list"),
        ({"text": 5}, "text is no str"),
        ({"data": [1, 2]}, "content is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "content is neither"),
    ],
)
def test_rows_that_only_look_like_a_layout_are_skipped_by_reason(row, reason):
    with pytest.raises(Skipped, match=reason):
        to_conversation(row, "auto")


def test_content_in_parts_of_text_is_one_text():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    found = to_conversation({"messages": [{"role": "user", "content": parts}]}, "auto")
    assert found.messages == [{"role": "user", "content": "a b"}]


def learnt(tokenizer, ids, mask):
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize("template", [None, UNMARKED])
def test_assistants_turns_are_learnt_whether_the_template_marks_them_or_not(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    ((ids, mask, _),) = ChatTokens(tokenizer, "all").encode(Conversation(MESSAGES))
    assert learnt(tokenizer, ids, mask) == "return x</s>no</s>"
    ((ids, mask, _),) = ChatTokens(tokenizer, "last").encode(Conversation(MESSAGES))
    assert learnt(tokenizer, ids, mask) == "no</s>"
    assert "return x" in tokenizer.decode(ids)


def test_where_later_turns_change_how_an_answer_is_rendered_each_is_learnt_as_it_was_served(tokenizer):
    tokenizer.chat_template = FORGETFUL
    chat = ChatTokens(tokenizer, "all")
    first, second = chat.encode(Conversation(MESSAGES))
    assert learnt(tokenizer, first.ids, first.mask) == "return x</s>"
    assert learnt(tokenizer, second.ids, second.mask) == "no</s>"
    assert tokenizer.decode(second.ids) == tokenizer.decode(chat.prompt(Conversation(MESSAGES[:3]))) + "no</s>"
    assert "return x" not in tokenizer.decode(second.ids)
    assert ChatTokens(tokenizer, "last").encode(Conversation(MESSAGES)) == [second]


def test_a_template_whose_prompt_ends_otherwise_than_a_rendered_answer_begins_is_found_out(tokenizer):
    tokenizer.chat_template = UNMARKED.replace("%}<|assistant|>{%", "%}<|assistant|>think{%")
    with pytest.raises(Skipped, match="renders a prompt differently once its answer follows"):
        ChatTokens(tokenizer, "all").encode(Conversation(MESSAGES))


def test_tools_calls_and_thoughts_come_to_the_template_as_sglang_gives_them(tmp_path, tokenizer):
    """Through a file with other rows, whose columns Arrow lends to all."""
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.function.name }}:{{ t.function.parameters | tojson }}]{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}"
        "{{ m.tool_call_id or '' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Rome"}'}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {"city": {"type": "string"}}}}
    other = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "so"},
    ]
    broken = {**call, "function": {"name": "find", "arguments": "{"}}
    rows = [
        {"messages": turns, "tools": [tool]},
        {"messages": MESSAGES, "tools": [other]},
        {"messages": [*turns[:2], {**turns[2], "tool_calls": [broken]}]},
    ]
    done = prepare(tmp_path, rows, "--tokenizer", tmp_path / "tokenizer")
    assert done.exit_code == 0, done.output
    assert "1: a tool call's arguments is no JSON" in done.output
    first, second = PreparedFile(tmp_path / "out.parquet")
    assert tokenizer.decode(first.input_ids) == (
        '[find:{"city": {"type": "string"}}]<developer>be brief<user>weather?<assistant>find city=Rome'
        "<tool>rainc1<assistant>(so)It rains."
    )
    assert learnt(tokenizer, first.input_ids, first.loss_mask) == "find city=Rome(so)It rains."
    assert tokenizer.decode(second.input_ids).startswith('[add:{"a": {"type": "int"}}]')


def test_settings_of_the_template_reach_it_and_must_be_an_object(tmp_path, tokenizer):
    tokenizer.chat_template = UNMARKED.replace("%}<|assistant|>{%", "%}<|assistant|>{{ '' if calm else 'think' }}{%")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = ("--tokenizer", tmp_path / "tokenizer", "--chat-template-kwargs")
    assert prepare(tmp_path, [{"messages": MESSAGES}], *given, '{"calm": true}').exit_code == 0
    assert prepare(tmp_path, [{"messages": MESSAGES}], *given, '{"calm": false}').exit_code == 2
    for wrong in ("calm", "[1]"):
        assert "--chat-template-kwargs" in prepare(tmp_path, [{"messages": MESSAGES}], *given, wrong).output


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no sequence is left to write: there were no rows"),
        ("not json\n", "no sequence is left to write: 1 rows no JSON"),
        ('{"text": "a"}\n', "no sequence is left to write: 1 rows shorter than 8 tokens"),
    ],
)
def test_a_file_that_gives_nothing_is_named_and_leaves_nothing(tmp_path, text, said):
    (tmp_path / "rows.jsonl").write_text(text)
    command = ["prepare-data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.parquet")]
    done = CliRunner().invoke(app, [*command, "--tokenizer", str(TOKENIZER)])
    assert done.exit_code == 2
    assert said in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_broken_line_is_skipped_alone(tmp_path, tokenizer):
    lines = [
        json.dumps({"messages": MESSAGES}).encode(),
        b'{"messages": [',
        b"[1]",
        b'{"text": "\\ud83d"}',
        b'{"a": "\xff"}',
        b"",
    ]
    lines.append(json.dumps({"text": "\U0001f600 an emoji and its \\u escape", "messages": None}).encode())
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    command = ["prepare-data", tmp_path / "rows.jsonl", "--out", tmp_path / "out.parquet", "--tokenizer", TOKENIZER]
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 0, done.output
    for reason in ("1: no JSON", "1: no object", "2: not Unicode"):
        assert reason in done.output
    assert len(PreparedFile(tmp_path / "out.parquet")) == 2


@pytest.mark.parametrize(("name", "text"), [("rows.json", '[{"a": '), ("rows.parquet", "no")])
def test_a_file_of_another_kind_that_cannot_be_read_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    command = ["prepare-data", str(tmp_path / name), "--out", str(tmp_path / "o"), "--tokenizer", str(TOKENIZER)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert f"{name} cannot be read" in done.output


def test_a_tokenizer_that_is_not_there_and_bounds_that_leave_nothing_are_refused(tmp_path):
    done = prepare(tmp_path, [{"text": "a"}], "--min-tokens", 50, "--max-tokens", 10)
    assert "--min-tokens 50 is more than --max-tokens 10" in done.output
    command = ["prepare-data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "o"), "--tokenizer", "/no/where"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "there is no tokenizer in '/no/where'" in done.output


def test_a_prompt_that_the_server_refuses_is_skipped_and_the_others_go_on(tmp_path, monkeypatch):
    def post(client, path, json):
        status = 400 if len(json["input_ids"]) > 20 else 200
        request = httpx.Request("POST", "http://s/generate")
        return httpx.Response(status, json={"output_ids": [20, 30, 1]}, request=request)

    monkeypatch.setattr(httpx.Client, "post", post)
    short = [{"role": "user", "content": "x"}, MESSAGES[1]]
    rows = [{"messages": [{"role": "user", "content": "long " * 30}, MESSAGES[1]]}, {"messages": short}]
    done = prepare(tmp_path, rows, "--regenerate", "http://s", "--min-tokens", 2)
    assert done.exit_code == 0, done.output
    assert "1: refused by the server" in done.output


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


CALLING = {"role": "assistant", "content": "f()", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("turns", "answers", "sequences", "asked", "said"),
    [
        (MESSAGES, [[40, 41, 1], [50, 1]], [[40, 41, 1], [50, 1]], 2, "2, of 1 rows"),
        (MESSAGES, [[40, 0, 41, 1], [50, 1]], [[40, 0, 41, 1]], 1, "1: turns after one with special tokens inside"),
        (MESSAGES, [[40, 41, 1], None], [[40, 41, 1]], 2, "1: refused by the server"),
        ([MESSAGES[0], CALLING, *MESSAGES[2:]], [[50, 1]], [["f()</s>"], [50, 1]], 1, "2, of 1 rows"),
    ],
    ids=["forgotten", "special", "refused", "calling"],
)
def test_regenerated_turns_are_learnt_until_one_cannot_be(
    tmp_path, monkeypatch, tokenizer, turns, answers, sequences, asked, said
):
    """Of a template that leaves out of earlier answers what it showed when they were given."""
    tokenizer.chat_template = FORGETFUL
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prompts = []

    def post(client, path, json):
        prompts.append(json["input_ids"])
        answer = answers[len(prompts) - 1]
        request = httpx.Request("POST", "http://s/generate")
        return httpx.Response(200 if answer else 400, json={"output_ids": answer}, request=request)

    monkeypatch.setattr(httpx.Client, "post", post)
    given = ("--tokenizer", tmp_path / "tokenizer", "--regenerate", "http://s", "--min-tokens", 2)
    done = prepare(tmp_path, [{"messages": turns}], *given)
    assert done.exit_code == 0, done.output
    assert said in done.output
    assert len(prompts) == asked
    found = [
        [i for i, m in zip(s.input_ids, s.loss_mask, strict=True) if m] for s in PreparedFile(tmp_path / "out.parquet")
    ]
    assert found == [tokenizer(s[0]).input_ids if isinstance(s[0], str) else s for s in sequences]


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
