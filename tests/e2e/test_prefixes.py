"""Chats of several turns with the prefix cache on: what the server did not compute again is trained on all the same."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from tests.e2e.conftest import TARGET, TRAINING, assert_every_token_is_accounted_for, prompts, settled


def chat(client, system, questions):
    """Each turn's prompt holds all turns before it; returns the turns."""
    context = system
    for question in questions:
        context = context + question
        context = context + client.generate(context, 24, ignore_eos=True)["output_ids"]
    return len(questions)


@pytest.mark.parametrize("store_mb", [pytest.param(512, marks=pytest.mark.slow), 1])
def test_turns_of_chats_are_trained_on_from_their_beginning(start, tmp_path, store_mb):
    store = {"prefix-store-mb": store_mb, "prefix-spill-dir": tmp_path}
    client = start("--dtype", "float32", "--chunked-prefill-size", 128, training={**TRAINING, **store})
    encode = AutoTokenizer.from_pretrained(TARGET).encode
    system = [i for text in prompts(60, seed=1) for i in encode(text)][:300]
    asked = [encode(text)[:40] for text in prompts(40, seed=2)]
    with ThreadPoolExecutor(4) as pool:
        turns = sum(pool.map(lambda i: chat(client, system, asked[i : i + 4]), range(0, 40, 4)))
    status = settled(client)
    prefixes = status["trainer"]["prefixes"]
    assert turns == 40
    assert prefixes["prefixes"] >= 36  # the first ones had nothing to find
    assert prefixes["whole_prefixes"] == prefixes["prefixes"]
    assert prefixes["missing_tokens"] == 0
    assert prefixes["restored_tokens"] > 36 * 300
    assert 0 < prefixes["stored_bytes"] <= store_mb << 20
    assert (prefixes["spilled_bytes"] > 4 << 20) == (store_mb == 1)
    assert_every_token_is_accounted_for(status)
    assert status["tokens"]["dropped"].get("too_long", 0) == 0
