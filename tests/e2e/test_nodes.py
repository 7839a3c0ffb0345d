"""One server of two nodes, each with a rank: here both on one machine, which share its disk."""

import pytest

from sglang_specforge.server_process import ServerFailed, ServerProcess, free_port
from tests.e2e.conftest import (
    SERVING,
    TARGET,
    TRAINING,
    assert_every_token_is_accounted_for,
    outputs,
    prompts,
    settled,
    training_flag,
    wait_for,
)

ANYWAY = {"drafting": "always"}  # a draft that does not pay here is still looked at


@pytest.fixture
def nodes(start, tmp_path):
    """Starts the second node, and then the first, each with the run folder that is given."""
    servers = []

    def begin(first_folder, second_folder):
        address = f"127.0.0.1:{free_port()}"
        shared = ("--dtype", "float32", "--disable-radix-cache", "--nnodes", 2, "--dist-init-addr", address)
        second = {**TRAINING, **ANYWAY, "run-dir": second_folder}
        flags = [part for name, value in second.items() for part in (training_flag(name), value)]
        arguments = ["--model-path", TARGET, *SERVING, *shared, "--node-rank", 1, "--enable-draft-training", *flags]
        servers.append(ServerProcess(tmp_path / "second.log", arguments, tp=2))
        training = {**TRAINING, "publish-every-s": 4, "run-dir": first_folder}
        client = start(*shared, "--node-rank", 0, training=training, tp=2)
        servers.insert(0, client.server)
        return client

    yield begin
    for server in servers:
        server.stop()


def test_a_rank_of_another_node_drafts_with_the_same_versions(nodes, reference, tmp_path):
    expected = reference()
    client = nodes(tmp_path / "run", tmp_path / "run")

    def swapped():
        assert outputs(client.generate_all(prompts(24), tokens=48)) == expected[:24]
        status = client.status()
        active = status["acceptance_by_version"].get(str(status["draft"]["active_version"]), {})
        return status["draft"]["swaps"] >= 2 and (active.get("length") or 0) >= 1.5

    wait_for("two swaps and an acceptance length of 1.5", swapped, 300)
    status = settled(client)
    assert_every_token_is_accounted_for(status)
    assert status["draft"]["refused"] == {}
    assert len(status["export"]) == 1
    assert status["trainer"]["parity"]["agreed"] == status["trainer"]["parity"]["compared"]


def test_nodes_with_run_folders_of_their_own_do_not_start(nodes, tmp_path):
    with pytest.raises(ServerFailed):
        nodes(tmp_path / "run", tmp_path / "elsewhere")
    why = f"node 1 does not see in {tmp_path / 'elsewhere'} what node 0 writes to {tmp_path / 'run'}"
    assert why in (tmp_path / "second.log").read_text()
