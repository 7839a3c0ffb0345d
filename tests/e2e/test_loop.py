"""The loop on the real server: capture, train, swap, under load, without a change to what clients get."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_specforge.checkpoint import FINGERPRINT_KEY
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.versions import VersionFolder
from tests.e2e.conftest import (
    TARGET,
    TRAINING,
    assert_every_token_is_accounted_for,
    outputs,
    prompts,
    settled,
    wait_for,
)

QUICK = {**TRAINING, "publish-every-s": 2, "replay-tokens": 20000}


@pytest.fixture
def client(start, reference):
    """As a user starts it: each process imports SGLang and finds the plugin by itself."""
    reference()  # its server has to be done with before this one starts
    return start("--dtype", "float32", "--chunked-prefill-size", 128, training=QUICK, kind=ServerProcess)


def test_output_is_that_of_a_server_without_speculation_while_drafts_are_swapped(client, reference):
    assert outputs(client.generate_all(prompts(50))) == reference()
    wait_for("a first swap", lambda: client.status()["draft"]["swaps"] >= 1)
    before, rounds = client.status(), []

    def swapped_twice():
        assert outputs(client.generate_all(prompts(50))) == reference()
        client.generate_all(prompts(12, seed=200 + len(rounds)))  # the same ones again would not be trained on
        rounds.append(1)
        return client.status()["draft"]["swaps"] >= before["draft"]["swaps"] + 2

    wait_for("two swaps more", swapped_twice)
    assert client.status()["acceptance"]["passes"] > before["acceptance"]["passes"]


def test_the_trainer_proposes_what_the_worker_proposed(client):
    """Served fp32 weights, run by the trainer on captured states, choose the very tokens the worker drafted."""

    def enough():
        # A first token that no other request has keeps the prefix cache out: the whole sequence is captured.
        rng = random.Random(client.status()["tokens"]["captured"])
        client.generate_all([[rng.randrange(5, 1024) for _ in range(12)] for _ in range(12)], tokens=32)
        parity = client.status()["trainer"]["parity"]
        return parity if parity["compared"] >= 500 else None

    parity = wait_for("500 compared proposals", enough, 240)
    assert parity["agreed"] == parity["compared"]


def test_every_captured_token_has_a_fate_after_mixed_requests(client):
    before = settled(client)["tokens"]["captured"]
    shared = " ".join(prompts(6, seed=3))[:900]
    rng = random.Random(0)
    texts = prompts(200, seed=4)

    def work(i):
        kind = i % 5
        if kind == 0:
            return client.generate(" ".join(prompts(12, seed=i))[:1600], tokens=8)  # chunked
        if kind == 1:
            return client.generate(shared + texts[i], tokens=16)
        if kind == 2:
            return client.generate(texts[i], tokens=1)
        if kind == 3:
            rid = f"aborted-{i}"
            with pytest.raises(httpx.TimeoutException):
                body = {"text": texts[i], "rid": rid, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
                client.post("/generate", json=body, timeout=0.3 + rng.random())
            client.post("/abort_request", json={"rid": rid})
            return None
        return client.generate(texts[i], tokens=24, temperature=0.8)

    with ThreadPoolExecutor(8) as pool:
        answers = [a["meta_info"] for a in pool.map(work, range(200)) if a]
    assert len(answers) == 160
    status = settled(client)
    assert_every_token_is_accounted_for(status)
    # Each answer's tokens were captured, but the last one, whose states no pass computes.
    expected = sum(a["prompt_tokens"] - a["cached_tokens"] + a["completion_tokens"] - 1 for a in answers)
    assert status["tokens"]["captured"] - before >= expected
    assert sum(a["cached_tokens"] for a in answers) > 1000
    assert status["trainer"]["malformed_messages"] == 0


def make_bad_checkpoint(client, folder, damage):
    versions = client.run_dir / "versions"
    shutil.copytree(versions / "initial", folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if damage == "shape":
        tensors["fc.weight"] = tensors["fc.weight"][:, :-1].contiguous()
    elif damage == "nan":
        tensors["norm.weight"][3] = torch.nan
    else:
        config[FINGERPRINT_KEY] = "feedfacefeedface"
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "named"), [("shape", "fc.weight has shape"), ("nan", "norm.weight"), ("target", "feedfacefeedface")]
)
def test_a_bad_checkpoint_is_refused_and_serving_goes_on(client, reference, tmp_path, damage, named):
    make_bad_checkpoint(client, tmp_path / "bad", damage)
    answer = client.post("/draft/versions", json={"path": str(tmp_path / "bad")})
    assert answer.status_code == 422
    assert named in answer.json()["message"]
    status = client.status()
    refused = [version for version, why in status["draft"]["refused"].items() if named in why]
    assert refused
    assert str(status["draft"]["active_version"]) not in refused
    assert outputs(client.generate_all(prompts(6))) == reference()[:6]


@pytest.mark.parametrize(
    ("way", "body"),
    [
        ("disk", {"model_path": str(TARGET)}),
        ("tensor", {"serialized_named_tensors": [""]}),
        ("distributed", {"names": ["lm_head.weight"], "dtypes": ["float32"], "shapes": [[1, 1]]}),
        ("ipc", {"zmq_handles": {}}),
    ],
)
def test_the_target_that_a_draft_is_trained_for_keeps_its_weights(client, reference, way, body):
    answer = client.post(f"/update_weights_from_{way}", json=body)
    assert answer.status_code == 400
    assert f"update_weights_from_{way} is refused under --enable-draft-training" in answer.json()["message"]
    assert outputs(client.generate_all(prompts(4), tokens=48)) == reference()[:4]


def test_a_good_checkpoint_is_swapped_in_over_http(client):
    initial = client.run_dir / "versions" / "initial"
    answer = client.post("/draft/versions", json={"path": str(initial)})
    assert answer.status_code == 200, answer.text
    version = answer.json()["version"]
    status = client.status()
    assert status["draft"]["active_version"] >= version
    assert client.post("/draft/versions", json={"path": str(initial / "nowhere")}).status_code == 422
    assert client.post("/draft/versions", json={"pth": "x"}).status_code == 400


def test_the_trainer_has_a_lower_priority_than_its_server(client):
    process = wait_for("a trainer", lambda: heard(client))["trainer"]["process"]
    server, trainer = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (client.server.process.pid, process["pid"]))
    assert trainer == min(19, server + 10)


@pytest.mark.parametrize("way", ["killed", "stopped for 30 s"])
def test_the_trainer_is_gone_and_no_request_notices(client, reference, way):
    wait_for("a trained step", lambda: client.status()["trainer"]["step"] > 0)
    process = client.status()["trainer"]["process"]
    if way == "killed":
        os.kill(process["pid"], signal.SIGKILL)
        for _ in range(2):
            assert outputs(client.generate_all(prompts(50))) == reference()
        after = wait_for("a restarted trainer", lambda: restarted(client, process["restarts"]))
        assert after["trainer"]["resumed_from_step"] > 0
    else:
        os.kill(process["pid"], signal.SIGSTOP)
        try:
            wait_for("30 s of requests", requests_for(client, reference, 30), 120)
            assert client.status()["trainer"]["state"] == "silent"
        finally:
            os.kill(process["pid"], signal.SIGCONT)
    step = wait_for("a word from the trainer", lambda: heard(client))["trainer"]["step"]
    client.generate_all(prompts(30, seed=9))
    wait_for("training goes on", lambda: client.status()["trainer"]["step"] > step)
    assert_every_token_is_accounted_for(settled(client))


def restarted(client, restarts):
    status = client.status()
    ready = status["trainer"]["process"]["restarts"] > restarts and heard(client)
    return status if ready and status["trainer"]["resumed_from_step"] else None


def heard(client):
    status = client.status()
    return status if status["trainer"]["silent_s"] < 3 else None


def requests_for(client, reference, seconds):
    end_s = time.monotonic() + seconds

    def more():
        assert outputs(client.generate_all(prompts(10))) == reference()[:10]
        return time.monotonic() > end_s

    return more


def test_the_command_line_shows_the_status(client):
    command = [sys.executable, "-m", "sglang_specforge", "status", "--url", client.server.url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "acceptance length" in shown.stdout
    wrong = subprocess.run([*command[:-1], "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "http://127.0.0.1:9 does not answer" in wrong.stderr


def test_a_published_version_serves_without_the_plugin_and_the_server_leaves_nothing_behind(client, start, reference):
    versions = VersionFolder(client.run_dir)
    newest = versions.path(versions.newest())
    trainer = client.status()["trainer"]["process"]["pid"]
    plain = start("--dtype", "float32", "--speculative-algorithm", "EAGLE3", "--speculative-num-steps", 3,
                  "--speculative-eagle-topk", 1, "--speculative-num-draft-tokens", 4,
                  "--speculative-draft-model-path", newest)  # fmt: skip
    assert not os.path.exists(f"/proc/{trainer}")
    answers = plain.generate_all(prompts(50))
    assert outputs(answers) == reference()
    lengths = [a["meta_info"]["spec_accept_length"] for a in answers]
    assert sum(lengths) / len(lengths) > 1.2
