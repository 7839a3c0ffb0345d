"""The ways that a request can go through a server; after each, every captured token has a fate."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sglang_specforge.cli import app
from sglang_specforge.server_process import ServerProcess
from tests.e2e.conftest import TARGET, TRAINING, assert_every_token_is_accounted_for, prompts, settled, wait_for

# A pool that a few long answers fill, so that some have to give theirs back and begin again.
POOL_TOKENS = 700


@pytest.fixture
def client(start):
    return start(
        "--dtype", "float32", "--disable-radix-cache", "--chunked-prefill-size", 64, "--max-total-tokens", POOL_TOKENS,
        "--schedule-conservativeness", 0.05,
        training=TRAINING,
    )  # fmt: skip


@pytest.fixture
def accounted(client):
    """The tokens captured during a test are accounted for at its end."""
    before = settled(client)["tokens"]
    yield lambda: settled(client)["tokens"]["captured"] - before["captured"]
    status = settled(client)
    assert_every_token_is_accounted_for(status)
    assert status["export"][0]["failure"] is None
    assert status["trainer"]["malformed_messages"] == 0
    assert "gap" not in status["tokens"]["dropped"]
    assert "abandoned" not in status["tokens"]["dropped"]


def dropped(client, reason):
    return settled(client)["tokens"]["dropped"].get(reason, 0)


def test_retracted_requests_send_positions_again_and_the_newest_are_used(client, accounted):
    before = dropped(client, "repeated")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: client.generate(text, 160, min_new_tokens=160), prompts(16, seed=20)))
    assert dropped(client, "repeated") > before
    expected = sum(a["meta_info"]["prompt_tokens"] + a["meta_info"]["completion_tokens"] - 1 for a in answers)
    assert accounted() >= expected


def test_four_answers_to_one_prompt_are_four_requests(client, accounted):
    seen = settled(client)["export"][0]["requests"]["captured"]
    answers = client.generate("Compute the sum", 24, n=4, temperature=0.9)
    assert len(answers) == 4
    assert accounted() >= sum(a["meta_info"]["completion_tokens"] - 1 for a in answers)
    assert settled(client)["export"][0]["requests"]["captured"] >= seen + 4


def test_an_id_that_is_given_again_at_once_is_another_request(client, accounted):
    seen, past = settled(client)["export"][0]["requests"]["captured"], dropped(client, "past_finish")
    expected = 0
    for text in prompts(30, seed=70):  # each as soon as the one before it is answered
        body = {"text": text, "rid": "the-same", "sampling_params": {"max_new_tokens": 6, "temperature": 0}}
        told = client.post("/generate", json=body).json()["meta_info"]
        expected += told["prompt_tokens"] + told["completion_tokens"] - 1
    assert accounted() - (dropped(client, "past_finish") - past) >= expected
    assert settled(client)["export"][0]["requests"]["captured"] == seen + 30


def test_stop_strings_cut_the_sample_where_the_answer_ends(client, accounted):
    free = client.generate("def main(", 64, ignore_eos=True)
    stop = free["text"][8:11]
    answer = client.generate("def main(", 64, ignore_eos=True, stop=[stop])
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert stop not in answer["text"]
    assert answer["meta_info"]["completion_tokens"] < 64
    accounted()


def test_answers_under_a_grammar_are_captured(client, accounted):
    answer = client.generate("A number", 24, regex="[0-9]{4,12}")
    assert answer["text"].strip().isdigit()
    assert accounted() >= answer["meta_info"]["prompt_tokens"] + answer["meta_info"]["completion_tokens"] - 1


def test_log_probabilities_come_with_captured_answers(client, accounted):
    answer = client.generate("A number", 24, ignore_eos=True)
    asked = client.post(
        "/generate",
        json={
            "text": "A number", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2,
            "sampling_params": {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
        },
    ).json()  # fmt: skip
    assert asked["text"] == answer["text"]
    assert len(asked["meta_info"]["output_token_logprobs"]) == 24
    assert len(asked["meta_info"]["input_token_logprobs"]) == asked["meta_info"]["prompt_tokens"]
    assert accounted() >= 2 * (asked["meta_info"]["prompt_tokens"] + 23)


def test_streams_that_clients_leave_are_closed_and_counted(client, accounted):
    def leave(i):
        body = {
            "text": prompts(1, seed=50 + i)[0], "stream": True,
            "sampling_params": {"max_new_tokens": 300, "ignore_eos": True},
        }  # fmt: skip
        with httpx.stream("POST", f"{client.server.url}/generate", json=body, timeout=60, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: ") and json.loads(line[6:])["meta_info"]["completion_tokens"] > 4 * i:
                    return

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(leave, range(12)))
    assert accounted() > 0
    wait_for("no open request", lambda: settled(client)["tokens"]["in_flight"] == 0)


def test_a_start_that_fails_says_why_and_leaves_no_process(tmp_path):
    unservable = ["--model-path", TARGET, "--dtype", "float32", "--quantization", "w8a8_int8"]  # a scheduler finds out
    flags = ["--enable-draft-training", "--draft-training-run-dir", tmp_path / "run"]
    server = ServerProcess(tmp_path / "log", [*unservable, *flags])
    try:
        assert server.process.wait(120) != 0
        wait_for("no process of its group", lambda: not server.has_processes(), 20)
        log = server.log.read_text()
        assert "torch.float32 is not supported for quantization method w8a8_int8" in log
        assert "server_patches" not in log
    finally:
        server.stop()


def test_a_server_that_is_told_to_end_lets_its_trainer_save(client):
    def saved():
        return max((int(f.name) for f in (client.run_dir / "checkpoints").glob("*") if f.name.isdigit()), default=0)

    def learns():
        before = client.status()
        if (step := before["trainer"]["step"]) > saved():
            return step
        client.generate_all(prompts(8, seed=before["tokens"]["captured"]))  # the same ones again would be dropped

    step = wait_for("a step after the newest checkpoint", learns)
    client.server.stop()
    assert saved() >= step


def test_drafts_are_changed_by_whoever_may_control_the_server_and_nobody_else(start, tmp_path):
    """SGLang's two keys: ``--admin-api-key`` for its control endpoints, ``--api-key`` for answers."""
    server = start("--api-key", "many", "--admin-api-key", "few", training={"trainer": "none"}).server

    def ask(method, path, key):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, server.url + path, headers=headers, timeout=30, trust_env=False)

    page = ask("GET", "/openapi.json", "many").json()["paths"]
    ours = [(method, path) for path, methods in page.items() if path.startswith("/draft/") for method in methods]
    assert len(ours) > 20
    for method, path in ours:
        path = re.sub("{.*?}", "1", path)
        assert {ask(method, path, key).status_code for key in (None, "many")} == {401}, (method, path)
    assert ask("GET", "/draft/run", "few").status_code == 200

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts(4)))
    commands = (
        (["prepare-data", tmp_path / "texts.jsonl", "--out", tmp_path / "data", "--tokenizer", TARGET], 0, "sequences"),
        (["status", "--url", server.url, "--api-key", "many"], 2, "wants its key"),
        (["status", "--url", server.url, "--api-key", "few"], 0, "version"),
        (["traffic", "--requests", 1, "--url", server.url, "--api-key", "many"], 0, "0 failed"),
        (["capture", "--data", tmp_path / "data", "--out", tmp_path / "states", "--url", server.url,
          "--api-key", "many", "--admin-api-key", "few"], 0, "stored "),
    )  # fmt: skip
    for command, code, said in commands:
        done = CliRunner().invoke(app, list(map(str, command)))
        assert (done.exit_code, said in done.output) == (code, True), done.output


def test_states_that_are_not_finite_stay_out_and_the_trainer_goes_on(start, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(TARGET, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.embed_tokens.weight"][(broken := 1000)] = torch.inf
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    training = {**TRAINING, "publish-every-s": 4}
    client = start("--dtype", "float32", "--disable-radix-cache", model=target, training=training)

    def answered_and_trained():
        with ThreadPoolExecutor(4) as pool:
            ill = pool.submit(client.generate, [*range(100, 110), broken, *range(110, 120)], 8)
            list(pool.map(client.generate, prompts(12)))
            ill.result()
        status = client.status()
        return status["trainer"]["step"] >= 10 and status["draft"]["swaps"] >= 1 and status

    wait_for("steps and a version", answered_and_trained)
    status = settled(client)
    assert status["tokens"]["dropped"]["not_finite"] >= 21
    assert status["trainer"]["skipped_steps"] == 0
    assert status["trainer"]["loss"] is not None
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"] > 0
    assert_every_token_is_accounted_for(status)
