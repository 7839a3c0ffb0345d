"""A target that reads images: its answers to text are learnt from, those about images are served and left out."""

import base64
import io
import random

import pytest
from PIL import Image

from tests.e2e.conftest import TRAINING, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.families import make_target

IMAGES = 4


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


def ask_about_images(client):
    """Different ones, each beside text, greedily."""
    answers = []
    for seed in range(IMAGES):
        file = io.BytesIO()
        Image.frombytes("RGB", (64, 64), random.Random(seed).randbytes(3 * 64 * 64)).save(file, "png")
        body = {
            "text": "A picture: <|vision_start|><|image_pad|><|vision_end|> shows",
            "image_data": base64.b64encode(file.getvalue()).decode(),
            "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
        }
        answer = client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        answers.append(answer.json())
    return answers


def test_text_is_learnt_from_beside_images_and_no_answer_changes(start, target):
    plain = start("--dtype", "float32", model=target)
    about_images, about_text = outputs(ask_about_images(plain)), outputs(plain.generate_all(prompts(8)))
    assert len({tuple(answer) for answer in about_images}) == IMAGES  # the images are looked at

    training = TRAINING | {"publish-every-s": 2}
    client = start("--dtype", "float32", "--disable-radix-cache", training=training, model=target)
    assert outputs(ask_about_images(client)) == about_images
    before = settled(client)
    assert before["export"][0]["requests"]["left_out"]["not_text"] == IMAGES
    assert before["tokens"]["captured"] == 0

    def learnt():
        client.generate_all(prompts(24, seed=client.status()["tokens"]["captured"]))
        status = client.status()
        return status["draft"]["swaps"] >= 1 and status["trainer"]["parity"]["compared"] >= 50

    wait_for("a swap and 50 compared proposals", learnt)
    assert outputs(ask_about_images(client)) == about_images
    assert outputs(client.generate_all(prompts(8))) == about_text
    status = settled(client)
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"]
    assert_every_token_is_accounted_for(status)
