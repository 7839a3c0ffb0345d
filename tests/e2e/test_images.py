"""A target that reads images: what it reads of them in place of tokens reaches the trainer, which learns from it."""

import base64
import io
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.e2e.conftest import TRAINING, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.families import FAMILIES, make_target

IMAGES = 8
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
SHOWN = {"qwen3_vl": QWEN, "qwen2_5_vl": QWEN, "gemma4": "<|image|>", "llama4": "<|image|>"}


def ask_about_images(client, family, question="shows"):
    """Different ones, each beside text, at once and greedily. Each has its own part of the prefix cache."""

    def ask(seed):
        file = io.BytesIO()
        Image.frombytes("RGB", (64, 64), random.Random(seed).randbytes(3 * 64 * 64)).save(file, "png")
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
    assert len(set(map(tuple, about_images))) == IMAGES  # the images are looked at

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


@pytest.mark.slow
def test_llama_4_s_draft_reads_images_as_it_is_trained_to(start, tmp_path):
    """In bfloat16, in which an answer depends on what it shares its passes with."""
    flags = (*FAMILIES["llama4"].flags, "--enable-multimodal", "--disable-radix-cache")
    client = start(*flags, training=TRAINING, model=make_target("llama4", tmp_path))
    assert len(set(map(tuple, ask_about_images(client, "llama4")))) > IMAGES / 2
    parity = settled(client)["trainer"]["parity"]
    assert parity["agreed"] >= 0.99 * parity["compared"] >= 40
