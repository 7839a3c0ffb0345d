"""A target that reads images: what it reads of them in place of tokens reaches the trainer, which learns from it."""

import base64
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from transformers import AutoTokenizer

from sglang_specforge.checkpoint import load_config
from sglang_specforge.new_draft import init_draft
from sglang_specforge.prepared import PreparedFile
from sglang_specforge.target import load_embedding_and_head
from sglang_specforge.versions import VersionFolder
from tests.e2e.conftest import (
    TRAINING,
    assert_every_token_is_accounted_for,
    outputs,
    prompts,
    run_module,
    settled,
    wait_for,
)
from tests.e2e.families import FAMILIES, make_target
from trainer.offline.reader import StoredSamples

IMAGES, SIDE = 8, 160  # pixels
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
AXES = {"qwen3_vl": {"mrope_section": [4, 2, 2], "mrope_interleaved": True}, "qwen2_5_vl": {"mrope_section": [4, 2, 2]}}
SHOWN = {
    "qwen3_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "gemma3_images": "<start_of_image>",
    "gemma4": "<|image|>",
    "llama4": "<|image|>",
}


def png(seed):
    file = io.BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), random.Random(seed).randbytes(3 * SIDE * SIDE)).save(file, "png")
    return file.getvalue()


def ask_about_images(client, family, question="shows"):
    """Different ones, each beside text, at once and greedily. Each has its own part of the prefix cache."""

    def ask(seed):
        body = {
            "text": f"A picture: {SHOWN[family]} {question}",
            "image_data": base64.b64encode(png(seed)).decode(),
            "extra_key": str(seed),
            "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
        }
        answer = client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(IMAGES) as pool:
        return outputs(pool.map(ask, range(IMAGES)))


SLOW = {family: pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2_5_vl", "gemma4", "gemma3_images")}
LEAST = {"gemma3_images": 0.98}  # of proposals that agree: what it multiplies embeddings by shows in the norm's epsilon


@pytest.mark.parametrize("family", ["qwen3_vl", *SLOW.values()])
def test_requests_about_images_are_learnt_from_and_no_answer_changes(start, tmp_path, family):
    target = make_target(family, tmp_path)
    flags = FAMILIES[family].flags
    plain = start(*flags, model=target)
    about_images, about_text = ask_about_images(plain, family), outputs(plain.generate_all(prompts(8)))
    again = ask_about_images(plain, family, "is of what")
    assert len(set(map(tuple, about_images))) > IMAGES / 2  # they are looked at

    training = TRAINING | {"publish-every-s": 2}
    client = start(*flags, training=training, model=target)
    assert ask_about_images(client, family) == about_images
    first = settled(client)
    assert first["export"][0]["requests"]["left_out"].get("not_text", 0) == 0
    parity = first["trainer"]["parity"]
    assert parity["compared"] >= 40  # those held out; without the images, half agree
    assert parity["agreed"] >= LEAST.get(family, 1) * parity["compared"]
    assert ask_about_images(client, family, "is of what") == again
    prefixes = settled(client)["trainer"]["prefixes"]
    assert prefixes["whole_prefixes"] == prefixes["prefixes"] == IMAGES

    def learnt():
        client.generate_all(prompts(12, seed=client.status()["tokens"]["captured"]))
        ask_about_images(client, family, random.Random().choice(prompts(100)))
        return client.status()["draft"]["swaps"] >= 1

    wait_for("a swap", learnt)
    assert ask_about_images(client, family) == about_images
    assert outputs(client.generate_all(prompts(8))) == about_text
    status = settled(client)
    parity = status["trainer"]["parity"]
    assert parity["agreed"] >= LEAST.get(family, 1) * parity["compared"]
    assert status["trainer"]["malformed_messages"] == 0
    assert_every_token_is_accounted_for(status)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_draft_that_turns_by_time_height_and_width_reads_images_as_it_is_trained_to(start, tmp_path, family):
    """As drafts for these targets from elsewhere do; those that are made here turn by one position."""
    target = make_target(family, tmp_path / "target")
    draft = init_draft(str(target), tmp_path / "draft", draft_vocab_size=768, dtype="float32")
    config = load_config(draft)
    config["rope_parameters"] |= AXES[family]
    (draft / "config.json").write_text(json.dumps(config))
    flags = ("--dtype", "float32", "--disable-radix-cache", "--speculative-draft-model-path", draft)
    client = start(*flags, training=TRAINING, model=target)
    ask_about_images(client, family)
    parity = settled(client)["trainer"]["parity"]
    assert parity["agreed"] == parity["compared"] >= 40  # turned by one position, a few do not


@pytest.mark.slow
def test_llama_4_s_draft_reads_images_as_it_is_trained_to(start, tmp_path):
    """In bfloat16, in which an answer depends on what it shares its passes with."""
    flags = (*FAMILIES["llama4"].flags, "--enable-multimodal", "--disable-radix-cache")
    client = start(*flags, training=TRAINING, model=make_target("llama4", tmp_path))
    assert len(set(map(tuple, ask_about_images(client, "llama4")))) > IMAGES / 2
    parity = settled(client)["trainer"]["parity"]
    assert parity["agreed"] >= 0.99 * parity["compared"] >= 40


def save_tokenizer(target, family, folder):
    """The target's, with a chat template that shows images."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'image' %}PLACE{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ).replace("PLACE", SHOWN[family])
    tokenizer.save_pretrained(folder)


# A random Gemma 3 answers with marks of images, which SGLang's scheduler ends at when they come back in a prompt.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma4"])
def test_data_that_show_images_are_stored_and_trained_on(start, tmp_path, family):
    target = make_target(family, tmp_path / "target")
    save_tokenizer(target, family, tmp_path / "tokenizer")
    rows = []
    for seed in range(IMAGES):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
        rows.append(
            {"role": "user", "content": [{"type": "image", "image": f"{seed}.png"}, {"type": "text", "text": "?"}]}
        )
        rows.append({"role": "user", "content": prompts(IMAGES)[seed]})
    answer = {"role": "assistant", "content": "?"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": [row, answer]}) + "\n" for row in rows))

    flags = FAMILIES[family].flags
    url = start(*flags, training={"trainer": "none"}, model=target).server.url
    data, states = tmp_path / "data.parquet", tmp_path / "states"
    run_module("sglang_specforge", "prepare-data", tmp_path / "rows.jsonl", "--out", data,
               "--tokenizer", tmp_path / "tokenizer", "--regenerate", url, "--max-new-tokens", 24)  # fmt: skip
    capture = ("sglang_specforge", "capture", "--data", data, "--out", states, "--url", url)
    assert f"without those of {IMAGES} images" in run_module(*capture, "--estimate")
    run_module(*capture)
    assert "stored 0 sequences" in run_module(*capture)

    samples, sequences = StoredSamples(states), {sequence.id: sequence for sequence in PreparedFile(data)}
    _, head_VH = load_embedding_and_head(target)
    as_answered = learnt = 0
    for sample in map(samples.load, samples.entries):
        assert len(sample.embeds_MH) == len(sample.places_M3) == int((sample.tokens_T < 0).sum())
        assert (len(sample.embeds_MH) > 4) == bool(sequences[sample.rid].images)
        rows_R = sample.generated_T.nonzero().flatten()
        assert len(rows_R) == sum(sequences[sample.rid].loss_mask)
        best_R = (sample.last_TH[rows_R] @ head_VH.mT).argmax(-1)
        as_answered, learnt = as_answered + int((best_R == sample.tokens_T[rows_R + 1]).sum()), learnt + len(rows_R)
    assert len(samples.entries) == len(sequences) == 2 * IMAGES
    assert as_answered == learnt

    run_module("trainer", "--data", states, "--run-dir", tmp_path / "run", "--draft-vocab-size", 768, "--epochs", 2,
               "--batch-tokens", 256, "--loss-on", "generated", "--holdout-every", 4)  # fmt: skip
    versions = VersionFolder(tmp_path / "run")
    trained = ("--speculative-draft-model-path", versions.path(versions.newest()))
    client = start(*flags, *trained, training=TRAINING, model=target)
    ask_about_images(client, family)
    parity = settled(client)["trainer"]["parity"]
    assert parity["agreed"] == parity["compared"] >= 40
