"""A trainer that reaches the server over the network alone: states over TCP, versions over HTTP."""

import shutil
import subprocess
import sys

import pytest

from sglang_specforge.client import NotCaptured, wait_until_captured
from sglang_specforge.curve import Identity
from sglang_specforge.export import pieces
from sglang_specforge.server_process import free_port
from tests.e2e.conftest import TARGET, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.test_attach import STREAMED, AttachedTrainer, is_read
from tests.e2e.test_layouts import NO_CACHE

# Takes the server for one whose sockets and disk it does not see.
ELSEWHERE = """
import sys
from trainer import attach, cli
attach.is_here = lambda run: False
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def server(start, reference):
    reference()
    return start("--dtype", "float32", NO_CACHE, "--served-model-name", "far", training=STREAMED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("far")


@pytest.fixture
def trainer(server, folder):
    """In a process that ends with the test."""
    trainer = far_trainer(server, folder)
    yield trainer
    trainer.end()


def far_trainer(server, folder, *more):
    target = folder / "target"
    if not target.exists():
        shutil.copytree(TARGET, target)
    flags = ("--listen", f"tcp://127.0.0.1:{free_port(in_a_row=2)}", "--target", target, *more)
    return AttachedTrainer([server], folder / "run", ("-c", ELSEWHERE), flags)


def reader():
    at = f"tcp://127.0.0.1:{free_port()}"
    return {"spans_endpoint": at, "control_endpoint": at, "key": Identity.new().public}


def test_a_trainer_elsewhere_improves_the_draft_and_every_token_is_accounted_for(server, trainer, reference):
    def swapped_twice():
        server.generate_all(prompts(24, seed=100 + len(rounds)), tokens=40)
        rounds.append(1)
        return server.status()["draft"]["swaps"] >= 2

    rounds = []
    wait_for("two versions that were brought to the server", swapped_twice, 240)
    assert outputs(server.generate_all(prompts(50))) == reference()
    status = settled(server)
    assert_every_token_is_accounted_for(status)
    assert [export["transport"] for export in status["export"]] == ["tcp"]
    assert status["reader"]["lease"]["spans_endpoint"].startswith("tcp://127.0.0.1:")
    assert status["tokens"]["trained"] > 0
    assert status["tokens"]["dropped"].keys() <= {"past_finish", "duplicate"}
    assert 0 < status["trainer"]["parity"]["compared"] == status["trainer"]["parity"]["agreed"]
    wait_for("what was uploaded is a version", lambda: not list((server.run_dir / "uploads").iterdir()))


def test_passes_that_are_cut_for_the_socket_arrive_whole(server, trainer):
    before = settled(server)
    asked = [[(7 * i + j) % 1000 for j in range(1900)] for i in range(6)]
    parameters = {"temperature": 0, "max_new_tokens": 2}
    assert server.post("/generate", json={"input_ids": asked, "sampling_params": parameters}).status_code == 200
    after = settled(server)
    passes = sum(export["passes"] for export in after["export"]) - sum(export["passes"] for export in before["export"])
    row_bytes = 4 * 192 * 4  # aux and last hidden states of a token, float32
    assert 6 * 1900 * row_bytes / passes > pieces._PIECE_BYTES  # so that some pass was longer
    assert after["tokens"]["captured"] - before["tokens"]["captured"] >= 6 * 1900
    assert_every_token_is_accounted_for(after)
    lost = {why: n for why, n in after["tokens"]["dropped"].items() if n > before["tokens"]["dropped"].get(why, 0)}
    assert lost.keys() <= {"past_finish", "duplicate"}


def test_others_are_refused_while_it_reads_and_told_why(server, trainer, folder):
    held = server.status()["reader"]["lease"]["spans_endpoint"]
    answer = server.post("/draft/reader", json=reader())
    assert (answer.status_code, held in answer.json()["message"]) == (409, True)
    with pytest.raises(NotCaptured, match=held):
        wait_until_captured(server.server.url)
    second = subprocess.run(
        [sys.executable, "-m", "trainer", "attach", "--server", server.server.url, "--run-dir", folder / "second"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert held in second.stderr
    assert is_read(server)


def test_a_killed_one_loses_its_lease_and_the_next_one_reads(server, folder, reference):
    killed = far_trainer(server, folder)
    killed.kill()
    assert outputs(server.generate_all(prompts(50))) == reference()
    wait_for("its lease runs out", lambda: server.status()["reader"]["lease"] is None)
    assert [export["transport"] for export in server.status()["export"]] != ["tcp"]
    again = far_trainer(server, folder)
    server.generate_all(prompts(24, seed=300), tokens=40)
    status = settled(server)
    assert_every_token_is_accounted_for(status)
    assert status["trainer"]["resumed_from_step"] > 0
    again.end()
    assert server.status()["reader"]["lease"] is None  # it said that it leaves


def test_a_checkpoint_is_uploaded_and_served(server, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(server.run_dir / "versions" / "initial", checkpoint)
    command = [sys.executable, "-m", "sglang_specforge", "swap", checkpoint, "--upload", "--url", server.server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    active = server.status()["draft"]["active_version"]
    assert f"version {active} is active" in done.stdout
    fetched = server.get(f"/draft/versions/{active}/model.safetensors").content
    assert fetched == (checkpoint / "model.safetensors").read_bytes()


def test_what_is_no_checkpoint_is_refused_and_not_kept(server):
    def uploads():
        return sorted((server.run_dir / "uploads").iterdir())  # a trainer that left may have left one

    files = {"config": b"[]", "weights": b"rubbish"}
    before, kept = server.status()["draft"]["active_version"], uploads()
    for path in ("/draft/uploads", "/draft/versions"):
        assert server.post(path, files=files).status_code == 422
    assert server.post("/draft/versions", files={**files, "config": b"{}"}).status_code == 422
    assert server.post("/draft/versions", files={"config": b"{}"}).status_code == 400
    assert server.status()["draft"]["active_version"] == before
    assert uploads() == kept


def test_a_server_that_starts_anew_is_read_again(server, trainer):
    key = server.status()["reader"]["key"]
    server.server.process.kill()
    server.server.restart()
    wait_for("the server that came back is read", lambda: is_read(server))
    server.generate_all(prompts(24, seed=400), tokens=40)
    status = settled(server)
    assert status["reader"]["key"] != key
    assert [export["transport"] for export in status["export"]] == ["tcp"]
    assert status["tokens"]["captured"] > 0
    assert_every_token_is_accounted_for(status)
