"""Stored data on the real server: prepare, capture, train, serve; and simulation against what is served."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zmq

from sglang_specforge.client import run_of, wait_until_captured
from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.frames import decode
from sglang_specforge.contracts.spans import Captured, alias_in
from sglang_specforge.prepared import PreparedFile
from sglang_specforge.training_settings import Job, Speculation, TrainingSettings
from sglang_specforge.versions import VersionFolder
from tests.e2e.conftest import TARGET, outputs, prompts, run_module, settled, wait_for
from trainer.assemble import Assembler
from trainer.evaluate import simulate
from trainer.inbox import Inbox
from trainer.learner import load_draft, load_target
from trainer.offline.reader import StoredSamples

CAPTURING = {"trainer": "none"}
STEP = {
    "ttt-steps": 3, "batch-tokens": 1024, "learning-rate": 2e-3, "warmup-steps": 20, "draft-vocab-size": 768,
    "loss-on": "generated",
}  # fmt: skip
ANSWER_TOKENS = 64


def make_dataset(client, folder, conversations):
    """Prompts and the target's own answers, as stored states."""
    rows = (
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "?"}]} for p in conversations
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = client.server.url
    run_module("sglang_specforge", "prepare-data", folder / "rows.jsonl", "--out", folder / "data.parquet",
        "--tokenizer", TARGET, "--regenerate", url, "--max-new-tokens", ANSWER_TOKENS)  # fmt: skip
    command = (
        "sglang_specforge",
        "capture",
        "--data",
        folder / "data.parquet",
        "--out",
        folder / "states",
        "--server",
        url,
    )
    assert "in all" in run_module(*command, "--estimate")
    run_module(*command)
    assert "stored 0 sequences" in run_module(*command)
    return folder / "states"


def train(data, run_dir, epochs):
    flags = {**STEP, "data": data, "run-dir": run_dir, "epochs": epochs, "schedule": "cosine"}
    run_module("trainer", *(part for name, value in flags.items() for part in (f"--{name}", value)))
    versions = VersionFolder(run_dir)
    return versions.path(versions.newest())


def accepted(answers):
    """SGLang's acceptance length, as a mean over requests."""
    return sum(a["meta_info"]["spec_accept_length"] for a in answers) / len(answers)


def test_a_request_names_its_slice_or_stays_out_of_training(start):
    client = start("--dtype", "float32", training=CAPTURING)
    ledger = TokenLedger()
    assembler = Assembler(ledger, 4096)
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(client.status()["spans_endpoint"])
    wait_until_captured(client.server.url)
    says = [
        ({"draft_slice": "code"}, {}), ({"draft_training": False}, {}), (None, {}),
        (None, {"X-Draft-Slice": "code"}), (None, {"X-Draft-Training": "false"}),
        ({"draft_training": False}, {"X-Draft-Training": "true"}),
    ]  # fmt: skip
    run, own = run_of(client.server.url), [str(i) for i in range(24) if i % 6 in (0, 2, 3)]
    expected = {run.alias(rid): "code" if int(rid) % 3 == 0 else "" for rid in own}
    sampling = {"temperature": 0, "max_new_tokens": 12}

    def ask(i):
        text, rid, (custom, headers) = prompts(24, seed=300)[i], f"{i}", says[i % 6]
        if i < 12:
            given = {"sampling_params": {**sampling, "custom_params": custom}}
            body = {"text": text, "rid": rid, "extra_key": rid, **given}
            return client.post("/generate", json=body, headers=headers)
        message = {"messages": [{"role": "user", "content": text}], "model": "m", "max_tokens": 12}
        body = {**message, "rid": rid, "custom_params": custom}
        return client.post("/v1/chat/completions", json=body, headers=headers)

    samples = {}

    def hear():
        while socket.poll(100):
            message, tensors = decode([frame.buffer for frame in socket.recv_multipart(copy=False)])
            if isinstance(message, Captured) and message.spans[0].proposed < 0:
                assert len(tensors["tokens_N"]) == message.tokens  # nobody else's rows ride along
            samples.update({alias_in(sample.rid): sample for sample in assembler.add(message, tensors)})
        return set(expected) <= set(samples)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(24)))
        wait_for("the states of twelve requests", hear, 60)
    socket.close()
    assert [answer.status_code for answer in answers] == [200] * 24
    assert {rid: sample.slice for rid, sample in samples.items()} == expected
    assert not set(own) & set(samples)  # no request is called by its id
    assert assembler.open_tokens == 0
    for route, body in (("/generate", {"text": "a"}), ("/v1/completions", {"model": "m", "prompt": "a"})):
        refused = client.post(route, json=body, headers={"X-Draft-Training": "perhaps"})
        assert refused.status_code == 400
        assert "give true or false" in refused.text


def test_prepared_captured_trained_and_served(start, reference, tmp_path):
    expected = reference()
    client = start("--dtype", "float32", training=CAPTURING)
    data = make_dataset(client, tmp_path, prompts(60, seed=100))
    stored = {entry.id: entry for entry in StoredSamples(data).entries}
    prepared = list(PreparedFile(tmp_path / "data.parquet"))
    assert len(stored) == len(prepared) >= 55
    sample = StoredSamples(data).load(stored[prepared[3].id])
    assert sample.tokens_T.tolist() == prepared[3].input_ids
    best = train(data, tmp_path / "run", epochs=12)

    for served in (Speculation(3), Speculation(3, topk=4, tokens=8)):
        client = start("--dtype", "float32", *speculative_flags(served, best), training=CAPTURING)
        samples, answers = serve_and_listen(client, prompts(100, seed=200))
        assert outputs(client.generate_all(prompts(50))) == expected
        assert accepted(answers) > 1.5
        assert_simulation_agrees(client, best, served, samples, answers)


def speculative_flags(speculation, draft):
    return [
        "--speculative-draft-model-path", draft, "--speculative-num-steps", speculation.steps,
        "--speculative-eagle-topk", speculation.topk, "--speculative-num-draft-tokens", speculation.drafts + 1,
    ]  # fmt: skip


def serve_and_listen(client, texts):
    """Answers, and the samples that a trainer would have got of them."""
    ledger = TokenLedger()
    inbox = Inbox(client.status()["spans_endpoint"], Assembler(ledger, 4096), ledger)
    wait_until_captured(client.server.url)
    run, rids, samples = run_of(client.server.url), [f"heard-{i}" for i in range(len(texts))], {}

    def hear():
        samples.update({alias_in(sample.rid): sample for sample in inbox.receive(0.1)})
        return set(map(run.alias, rids)) <= set(samples)

    def ask(rid, text):
        # A key of its own keeps the prefix cache out: all of the sequence is computed, and heard.
        sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS}
        answer = client.post(
            "/generate", json={"text": text, "rid": rid, "extra_key": rid, "sampling_params": sampling}
        )
        answer.raise_for_status()
        return answer.json()

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, *request) for request in zip(rids, texts, strict=True)]
        wait_for("the states of all requests", hear, 300)
    inbox.close()
    return [samples[run.alias(rid)] for rid in rids], [answer.result() for answer in answers]


def assert_simulation_agrees(client, checkpoint, speculation, samples, answers):
    status = client.status()
    job = Job(
        settings=TrainingSettings(), target_path=status["target_path"], target_fingerprint=status["target_fingerprint"],
        draft_path=str(checkpoint), served_dtype="float32", speculation=speculation,
    )  # fmt: skip
    draft, target = load_draft(job, checkpoint), load_target(job, torch.float32, torch.device("cpu"))
    lengths = []
    for sample, answer in zip(samples, answers, strict=True):
        found = simulate(draft, target, [sample], speculation)
        assert found.tokens == answer["meta_info"]["completion_tokens"]
        lengths.append(found.tokens / found.verify_steps)
    assert sum(lengths) / len(lengths) == pytest.approx(accepted(answers), rel=0.03)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_offline_training_reaches_what_the_live_loop_reaches_on_the_same_tokens(start, tmp_path):
    conversations, held_out, epochs = prompts(300, seed=100), prompts(100, seed=200), 8
    data = make_dataset(start("--dtype", "float32", training=CAPTURING), tmp_path, conversations)
    asked = [p.input_ids[: p.loss_mask.index(True)] for p in PreparedFile(tmp_path / "data.parquet")]
    offline = train(data, tmp_path / "run", epochs)
    given = ["--speculative-draft-model-path", offline]
    reached = accepted(start("--dtype", "float32", *given, training=CAPTURING).generate_all(held_out, ANSWER_TOKENS))

    live = start(
        "--dtype", "float32", training={**STEP, "epochs-per-token": epochs, "publish-every-s": 5, "gate": "off"}
    )
    live.generate_all(asked, ANSWER_TOKENS)
    wait_for("the live loop has trained on all of it", lambda: live.status()["trainer"]["state"] == "waiting", 900)
    status = settled(live)
    live_reached = accepted(live.generate_all(held_out, ANSWER_TOKENS))
    print(f"offline {reached:.3f}, live {live_reached:.3f} after {status['tokens']['trained']:,} tokens")
    assert reached >= live_reached
