"""One server of two nodes, each with a rank: here both on one machine, which share its disk."""

import subprocess
import sys

import pytest

from sglang_specforge.server_process import ServerFailed, ServerProcess, free_port
from tests.e2e.conftest import SERVING, TARGET, training_flags, wait_for
from tests.e2e.test_attach import STREAMED, AttachedTrainer
from tests.e2e.test_layouts import NO_CACHE, STEADY, moe, run_loop  # noqa: F401 - a fixture


@pytest.fixture
def nodes(start, tmp_path):
    """Starts the second node, and then the first, each with the run folder that is given."""
    servers = []

    def begin(first_folder, second_folder, *arguments, training=(), model=TARGET):
        address = f"127.0.0.1:{free_port()}"
        shared = ("--dtype", "float32", NO_CACHE, "--nnodes", 2, "--dist-init-addr", address, *arguments)
        training = {**STEADY, **dict(training)}
        flags = training_flags(training | {"run-dir": second_folder})
        of_second = ["--model-path", model, *SERVING, "--log-level", "info", *shared, "--node-rank", 1, *flags]
        second = ServerProcess(tmp_path / "second.log", of_second, tp=2)
        servers.append(second)
        # It looks whether the ports are free that the first, here on the same machine, will listen at.
        wait_for("the second node has seen its ports", lambda: "server_args=" in second.log.read_text())
        client = start(*shared, "--node-rank", 0, training=training | {"run-dir": first_folder}, model=model, tp=2)
        servers.insert(0, client.server)
        return client

    yield begin
    for server in servers:
        server.stop()


def test_a_rank_of_another_node_drafts_with_the_same_versions(nodes, reference, tmp_path):
    expected = reference()
    client = nodes(tmp_path / "run", tmp_path / "run", "--enable-metrics")
    status = run_loop(client, expected, acceptance=1.3)
    assert "sglang_specforge:swaps_total" in client.get("/metrics").text
    assert len(status["export"]) == 1
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"]


@pytest.mark.slow
def test_a_trainer_that_listens_learns_from_the_requests_of_both_nodes(nodes, reference, moe, tmp_path):  # noqa: F811
    expected = reference(moe)
    client = nodes(tmp_path / "run", tmp_path / "run", "--attn-dp-size", 2, training=STREAMED, model=moe)
    refused = subprocess.run(
        [sys.executable, "-m", "trainer", "attach", "--server", client.server.url, "--run-dir", tmp_path / "refused"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "computes requests on 2 nodes; give --listen" in refused.stderr + refused.stdout
    listen = ("--listen", f"tcp://127.0.0.1:{free_port(in_a_row=2)}")
    trainer = AttachedTrainer([client], tmp_path / "trained", ("-m", "trainer"), listen)
    try:
        status = run_loop(client, expected, transport="tcp")
    finally:
        trainer.end()
    assert len(status["export"]) == 2
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"]
    assert min(export["captured"] for export in status["export"]) > 0.2 * status["tokens"]["captured"]


@pytest.mark.slow
def test_nodes_with_run_folders_of_their_own_do_not_start(nodes, tmp_path):
    with pytest.raises(ServerFailed):
        nodes(tmp_path / "run", tmp_path / "elsewhere")
    why = f"node 1 does not see in {tmp_path / 'elsewhere'} what node 0 writes to {tmp_path / 'run'}"
    assert why in (tmp_path / "second.log").read_text()
