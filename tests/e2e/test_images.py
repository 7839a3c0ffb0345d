"""A target that reads images: what it reads of them in place of tokens reaches the trainer, which learns from it."""

import base64
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from sglang_specforge.checkpoint import load_config
from sglang_specforge.new_draft import init_draft
from tests.e2e.conftest import TRAINING, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.families import FAMILIES, make_target

IMAGES, SIDE = 8, 160  # pixels
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
AXES = {"qwen3_vl": {"mrope_section": [4, 2, 2], "mrope_interleaved": True}, "qwen2_5_vl": {"mrope_section": [4, 2, 2]}}
SHOWN = {"qwen3_vl": QWEN, "qwen2_5_vl": QWEN, "gemma4": "<|image|>", "llama4": "<|image|>"}


def ask_about_images(client, family, question="shows"):
    """Different ones, each beside text, at once and greedily. Each has its own part of the prefix cache."""

    def ask(seed):
        file = io.BytesIO()
        Image.frombytes("RGB", (SIDE, SIDE), random.Random(seed).randbytes(3 * SIDE * SIDE)).save(file, "png")
        body = {
            "text": f"A picture: {SHOWN[family]} {question}",
            "image_data": base64.b64encode(file.getvalue()).decode(),
            "extra_key": str(seed),
            "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
        }
        answer = client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(IMAGES) as pool:
        return outputs(pool.map(ask, range(IMAGES)))


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2_5_vl", "gemma4")]


@pytest.mark.parametrize("family", ["qwen3_vl", *SLOW])
def test_requests_about_images_are_learnt_from_and_no_answer_changes(start, tmp_path, family):
    target = make_target(family, tmp_path)
    plain = start("--dtype", "float32", model=target)
    about_images, about_text = ask_about_images(plain, family), outputs(plain.generate_all(prompts(8)))
    again = ask_about_images(plain, family, "is of what")
    assert len(set(map(tuple, about_images))) > IMAGES / 2  # they are looked at

    training = TRAINING | {"publish-every-s": 2}
    client = start("--dtype", "float32", training=training, model=target)
    assert ask_about_images(client, family) == about_images
    first = settled(client)
    assert first["export"][0]["requests"]["left_out"].get("not_text", 0) == 0
    parity = first["trainer"]["parity"]
    assert parity["agreed"] == parity["compared"] >= 40  # those held out; without the images, half agree
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
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"]
    assert status["trainer"]["malformed_messages"] == 0
    assert_every_token_is_accounted_for(status)


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
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
