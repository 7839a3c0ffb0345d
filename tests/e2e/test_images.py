"""A target that reads images: what it reads of them in place of tokens reaches the trainer, which learns from it."""

import base64
import io
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.e2e.conftest import TRAINING, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.families import make_target

IMAGES = 8
SHOWN = "A picture: <|vision_start|><|image_pad|><|vision_end|> "


def ask_about_images(client, question="shows"):
    """Different ones, each beside text, at once and greedily. Each has its own part of the prefix cache."""

    def ask(seed):
        file = io.BytesIO()
        Image.frombytes("RGB", (64, 64), random.Random(seed).randbytes(3 * 64 * 64)).save(file, "png")
        body = {
            "text": SHOWN + question,
            "image_data": base64.b64encode(file.getvalue()).decode(),
            "extra_key": str(seed),
            "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
        }
        answer = client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(IMAGES) as pool:
        return outputs(pool.map(ask, range(IMAGES)))


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_requests_about_images_are_learnt_from_and_no_answer_changes(start, tmp_path, family):
    target = make_target(family, tmp_path)
    plain = start("--dtype", "float32", model=target)
    about_images, about_text = ask_about_images(plain), outputs(plain.generate_all(prompts(8)))
    again = ask_about_images(plain, "is of what")
    assert len(set(map(tuple, about_images))) == IMAGES  # the images are looked at

    training = TRAINING | {"publish-every-s": 2}
    client = start("--dtype", "float32", training=training, model=target)
    assert ask_about_images(client) == about_images
    first = settled(client)
    assert first["export"][0]["requests"]["left_out"].get("not_text", 0) == 0
    parity = first["trainer"]["parity"]
    assert parity["agreed"] == parity["compared"] >= 40  # those held out; without the images, half agree
    assert ask_about_images(client, "is of what") == again
    prefixes = settled(client)["trainer"]["prefixes"]
    assert prefixes["whole_prefixes"] == prefixes["prefixes"] == IMAGES

    def learnt():
        client.generate_all(prompts(12, seed=client.status()["tokens"]["captured"]))
        ask_about_images(client, random.Random().choice(prompts(100)))
        return client.status()["draft"]["swaps"] >= 1

    wait_for("a swap", learnt)
    assert ask_about_images(client) == about_images
    assert outputs(client.generate_all(prompts(8))) == about_text
    status = settled(client)
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"]
    assert status["trainer"]["malformed_messages"] == 0
    assert_every_token_is_accounted_for(status)
