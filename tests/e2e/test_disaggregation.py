"""PD disaggregation: one server computes prompts, another answers, and one trainer joins what they computed."""

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from sglang_specforge.server_process import free_port
from tests.e2e.conftest import assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.test_attach import STREAMED, AttachedTrainer

pytest.importorskip("mooncake.engine", reason="transfers KV; it needs libibverbs1", exc_type=ImportError)
ONE_PROCESS = ("-m", "trainer")


class Pair:
    """A prefill and a decode server; a request goes to both, as a router sends it."""

    def __init__(self, start):
        self._port = free_port()
        flags = (
            "--dtype", "float32", "--disaggregation-transfer-backend", "mooncake_tcp",
            "--disaggregation-bootstrap-port", self._port, "--disaggregation-decode-retraction-backup", "cpu_tensor",
        )  # fmt: skip
        self.prefill = start(*flags, "--disaggregation-mode", "prefill", training=STREAMED)
        self.decode = start(*flags, "--disaggregation-mode", "decode", training=STREAMED, beside=True)

    def generate(self, prompt):
        """What the decode server answers."""
        body = {
            "text": prompt, "bootstrap_host": "127.0.0.1", "bootstrap_port": self._port,
            "bootstrap_room": random.getrandbits(60), "sampling_params": {"temperature": 0, "max_new_tokens": 48},
        }  # fmt: skip
        with ThreadPoolExecutor(2) as pool:
            answers = pool.map(lambda client: client.post("/generate", json=body), (self.prefill, self.decode))
        *_, answer = [answer.raise_for_status() for answer in answers]
        return answer.json()

    def generate_all(self, texts):
        with ThreadPoolExecutor(6) as pool:
            return list(pool.map(self.generate, texts))


@pytest.fixture(scope="module")
def pair(start, reference):
    reference()
    return Pair(start)


def test_one_trainer_learns_answers_from_their_whole_context_and_serves_both(pair, reference, tmp_path):
    trainer = AttachedTrainer([pair.prefill, pair.decode], tmp_path / "run", ONE_PROCESS)

    def rising():
        pair.generate_all(prompts(24, seed=len(rounds)))
        rounds.append(1)
        status = pair.decode.status()
        newest = status["acceptance_by_version"].get(str(status["draft"]["active_version"]))
        return status["draft"]["swaps"] >= 2 and newest is not None and newest["length"] > 1.2

    rounds = []
    wait_for("an acceptance length of 1.2", rising, 240)
    assert outputs(pair.generate_all(prompts(50))) == reference()
    prefill, decode = settled(pair.prefill), settled(pair.decode)
    trainer.end()
    for status in (prefill, decode):
        assert_every_token_is_accounted_for(status)
        assert status["export"][0]["failure"] is None
        assert status["draft"]["active_version"] >= 2
    assert prefill["tokens"]["dropped"] == {"kept_as_prefix": prefill["tokens"]["captured"]}
    assert decode["tokens"]["dropped"].keys() <= {"past_finish", "duplicate"}
    prefixes = decode["trainer"]["prefixes"]
    assert prefixes["whole_prefixes"] == prefixes["prefixes"] == decode["export"][0]["requests"]["captured"]
    assert prefixes["restored_tokens"] > 5 * prefixes["prefixes"]


def test_a_prefill_server_that_ends_costs_answers_and_no_account(pair, tmp_path):
    trainer = AttachedTrainer([pair.prefill, pair.decode], tmp_path / "run", ONE_PROCESS)
    pair.generate_all(prompts(6, seed=90))
    pair.prefill.server.stop()
    with pytest.raises(httpx.HTTPError):
        pair.generate(prompts(1, seed=91)[0])
    status = settled(pair.decode)
    trainer.end()
    assert_every_token_is_accounted_for(status)
