"""Conversations that show images: where data have them, what is written of them, and what a server is sent."""

import base64
import json
from pathlib import Path

import datasets
import httpx
import pytest
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

from sglang_specforge.cli import app
from sglang_specforge.images import as_sent
from sglang_specforge.prepare.conversations import _undecoded
from sglang_specforge.prepared import PreparedFile

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_target"
PLACE = "<|picture|>"
CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|picture|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>CONTENT{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWER = {"role": "assistant", "content": "It is red."}
ASKED, ANSWERED = {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is red."}


def part(name):
    return {"type": "image_url", "image_url": {"url": name}}


def ask(*content, answer=ANSWER):
    parts = [{"type": "text", "text": given} if isinstance(given, str) else given for given in content]
    return [{"role": "user", "content": parts}, answer]


@pytest.fixture
def folder(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    save_tokenizer(tmp_path, TEMPLATE.replace("CONTENT", CONTENT))
    return tmp_path


def save_tokenizer(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens([PLACE], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "tokenizer")


def prepare(folder, rows, *options):
    if rows is not None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = folder / ("rows.jsonl" if rows is not None else "rows.parquet")
    command = ["prepare-data", source, "--out", folder / "out.parquet", "--tokenizer", folder / "tokenizer", *options]
    done = CliRunner().invoke(app, [str(given) for given in (*command, "--min-tokens", 2)])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found = list(PreparedFile(folder / "out.parquet")) if done.exit_code == 0 else []
    return done.output, found, [tokenizer.decode(sequence.input_ids) for sequence in found]


@pytest.mark.parametrize(
    ("row", "text", "names"),
    [
        ({"messages": ask("What is ", part("red.png"), "?")}, f"What is {PLACE}?", ["red.png"]),
        ({"messages": ask({"type": "image", "image": "red.png"}, "What?")}, f"{PLACE}What?", ["red.png"]),
        (
            {"messages": ask({"type": "image"}, "And ", {"type": "image"}), "images": ["blue.png", "red.png"]},
            f"{PLACE}And {PLACE}",
            ["blue.png", "red.png"],
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, ANSWERED], "image": "red.png"},
            f"{PLACE}\nWhat?",
            ["red.png"],
        ),
        (
            {"conversations": [ASKED, ANSWERED], "images": ["red.png", "blue.png"]},
            f"{PLACE}{PLACE}What is it?",
            ["red.png", "blue.png"],
        ),
    ],
    ids=["openai", "named in parts", "column for parts", "column for marks", "column alone"],
)
def test_images_are_shown_where_every_layout_has_them(folder, row, text, names):
    other = {"messages": [{"role": "user", "content": "no image here"}, ANSWER]}
    output, (found, without), texts = prepare(folder, [row, other])
    assert texts == [f"<|user|>{text}<|assistant|>It is red.</s>", "<|user|>no image here<|assistant|>It is red.</s>"]
    assert found.images == [str(folder / name) for name in names], output
    assert without.images == []
    assert sum(found.loss_mask) == sum(without.loss_mask)


def test_images_that_a_dataset_holds_itself_are_kept_as_they_are(folder):
    content = (folder / "red.png").read_bytes()
    image = {"bytes": content, "path": None}
    row = {"conversations": [[ASKED, ANSWERED]], "images": [[image]]}
    features = datasets.Features(
        conversations=datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        images=datasets.List(datasets.Image()),
    )
    datasets.Dataset.from_dict(row, features=features).to_parquet(folder / "rows.parquet")
    output, (found,), _ = prepare(folder, None)
    (held,) = found.images
    assert base64.b64decode(held.partition(",")[2]) == content, output
    assert as_sent(found.images) == [held] == as_sent([str(folder / "red.png")])


def test_what_is_no_image_of_a_dataset_is_read_as_ever():
    text, image = datasets.Value("string"), datasets.Image()
    others = datasets.Features(pair=datasets.List(text, length=2), turns=datasets.List({"value": text}))
    assert _undecoded(others) == others
    assert _undecoded({"images": datasets.List(image, length=2)})["images"].length == 2


def test_the_same_question_about_another_image_is_another_sequence(folder):
    (folder / "again.png").write_bytes((folder / "red.png").read_bytes())
    rows = [{"messages": ask(part(name), "What?")} for name in ("red.png", "blue.png", "again.png", "http://x/red.png")]
    output, found, _ = prepare(folder, rows)
    assert len({sequence.id for sequence in found}) == len(found) == 3
    assert "1: the same as another" in output


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": ask(part("green.png"), "What?")}, "an image is not there"),
        ({"messages": ask({"type": "image"}, "What?")}, "it shows more images than it has"),
        ({"messages": ask(part("red.png"), "What?"), "images": ["red.png"]}, "it has more images than it shows"),
        ({"messages": ask("Draw.", answer={"role": "assistant", "content": [part("red.png")]})}, "an assistant shows"),
        ({"messages": ask({"type": "input_audio"}, "What?")}, "content is neither text nor images"),
    ],
)
def test_what_cannot_be_shown_is_skipped_by_reason(folder, row, reason):
    output, found, _ = prepare(folder, [row, {"messages": ask(part("red.png"), "What?")}])
    assert f"1: {reason}" in output
    assert len(found) == 1


def test_a_template_without_a_place_for_images_is_found_out(folder):
    save_tokenizer(folder, TEMPLATE.replace("CONTENT", "{{ m.content }}"))
    output, _, _ = prepare(folder, [{"messages": ask(part("red.png"), "What?")}])
    assert "1 rows the chat template has no place for images" in output


def test_an_answer_is_regenerated_from_the_image(folder, monkeypatch):
    asked = []

    def post(client, path, json):
        asked.append(json)
        return httpx.Response(200, json={"output_ids": [40, 1]}, request=httpx.Request("POST", "http://s/generate"))

    monkeypatch.setattr(httpx.Client, "post", post)
    rows = [{"messages": ask(part(name), "What?")} for name in ("red.png", "blue.png")]
    output, found, texts = prepare(folder, rows, "--regenerate", "http://s", "--concurrency", 1)
    assert [body["image_data"] for body in asked] == [as_sent([str(folder / name)]) for name in ("red.png", "blue.png")]
    assert [sequence.images for sequence in found] == [[str(folder / name)] for name in ("red.png", "blue.png")], output
    assert all(text.startswith(f"<|user|>{PLACE}What?<|assistant|>") for text in texts)
