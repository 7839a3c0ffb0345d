"""What is captured: whole requests, within the limits, for whoever listens; and served is served all the same."""

import time

import pytest
import zmq

from sglang_specforge.client import wait_until_captured
from tests.e2e.conftest import TRAINING, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for

ROW_BYTES = 4 * 192 * 4  # aux and last hidden states of the tiny target in float32
BUDGET_MB_S = 1.0


@pytest.fixture
def capturing(start):
    return start("--dtype", "float32", training={"trainer": "none"})


def requests_of(client):
    (export,) = client.status()["export"]
    return export["requests"]


def test_nothing_leaves_the_server_while_nobody_listens_and_acceptance_is_known_all_the_same(capturing):
    before = capturing.status()
    assert [export["closed"] for export in before["export"]] == ["nobody_listening"]
    capturing.generate_all(prompts(8))
    after = wait_for(
        "counted verifications",
        lambda: (s := capturing.status())["acceptance"]["passes"] > before["acceptance"]["passes"] and s,
    )
    assert after["tokens"]["captured"] == before["tokens"]["captured"]
    assert requests_of(capturing)["left_out"]["nobody_listening"] >= 8


def test_capture_is_paused_and_resumed_over_http(capturing):
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(capturing.status()["spans_endpoint"])
    wait_until_captured(capturing.server.url)
    assert capturing.post("/draft/capture", json={"enabled": False}).json() == {"enabled": False}
    wait_for("a paused exporter", lambda: capturing.status()["export"][0]["closed"] == "paused")
    before = requests_of(capturing)["captured"]
    capturing.generate_all(prompts(4))
    assert requests_of(capturing)["captured"] == before
    for body in ({"enabled": "maybe"}, {"enable": True}, {}, {"enabled": 1}):
        assert capturing.post("/draft/capture", json=body).status_code in (400, 422)
    assert capturing.status()["export"][0]["closed"] == "paused"
    capturing.post("/draft/capture", json={"enabled": True})
    wait_until_captured(capturing.server.url)
    capturing.generate_all(prompts(4))
    assert requests_of(capturing)["captured"] == before + 4
    socket.close()


def test_a_budget_leaves_whole_requests_out_and_no_output_changes(start, reference):
    expected = reference()
    limits = {**TRAINING, "capture-max-mb-s": BUDGET_MB_S}
    client = start("--dtype", "float32", "--disable-radix-cache", training=limits)
    before, begun_s = settled(client)["tokens"], time.monotonic()
    for _ in range(3):
        assert outputs(client.generate_all(prompts(50), workers=16)) == expected
    took_s, status = time.monotonic() - begun_s, settled(client)
    captured_mb = (status["tokens"]["captured"] - before["captured"]) * ROW_BYTES / 2**20
    requests = requests_of(client)
    assert requests["left_out"]["over_budget"] > 0
    assert requests["captured"] > 0
    # A second's worth may be spared for bursts; padding rows of a verification count as well, so less is captured.
    assert captured_mb <= BUDGET_MB_S * (took_s + 2)
    assert_every_token_is_accounted_for(status)
    assert "gap" not in status["tokens"]["dropped"]
    assert "ring_full" not in requests["left_out"]


@pytest.mark.slow
def test_a_sample_of_the_requests_is_captured_whole(start):
    client = start("--dtype", "float32", "--disable-radix-cache", training={**TRAINING, "capture-sample": 0.5})
    before = requests_of(client)
    answers = client.generate_all([[i + 5, *range(5, 30)] for i in range(120)], tokens=8)
    status = settled(client)
    captured = requests_of(client)["captured"] - before["captured"]
    assert 35 <= captured <= 85
    per_request = answers[0]["meta_info"]["prompt_tokens"] + 7
    past_finish = status["tokens"]["dropped"].get("past_finish", 0)
    assert status["tokens"]["captured"] - past_finish >= captured * per_request
    assert requests_of(client)["left_out"]["sampled_out"] >= 120 - captured
    assert_every_token_is_accounted_for(status)


def test_only_requests_that_say_so_and_of_no_denied_slice_are_captured_where_the_operator_wants_that(start):
    limits = {"capture-opt-in": "true", "capture-deny": "internal,médical"}
    client = start("--dtype", "float32", training={"trainer": "none", **limits})
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(client.status()["spans_endpoint"])
    wait_until_captured(client.server.url)
    before = requests_of(client)
    for _ in range(3):
        client.generate("nothing said")
        client.generate("said in the body", custom_params={"draft_training": True})
        header = {"X-Draft-Training": "true"}
        for route, body in (("/generate", {"text": ["a", "b"]}), ("/v1/completions", {"model": "m", "prompt": "c"})):
            assert client.post(route, json=body, headers=header).status_code == 200
        labelled = {**header, "X-Draft-Slice": "médical".encode()}
        assert client.post("/generate", json={"text": ["d", "e"]}, headers=labelled).status_code == 200
        client.generate("f", custom_params={"draft_training": True, "draft_slice": "internal"})
    for body in ({"draft_training": "false"}, {"draft_slice": ["internal"]}):
        answer = client.post("/generate", json={"text": "g", "sampling_params": {"custom_params": body}})
        assert (answer.status_code, "is not accepted; give " in answer.text) == (400, True)
    requests = requests_of(client)
    assert requests["captured"] == before["captured"] + 3 * 4
    assert requests["left_out"]["denied"] == 3 * 3
    assert requests["left_out"]["not_opted_in"] == before["left_out"].get("not_opted_in", 0) + 3
    socket.close()
