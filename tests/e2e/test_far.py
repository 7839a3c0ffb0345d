"""A trainer that reaches the server over the network alone: states over TCP, versions over HTTP."""

import shutil
import socket

import pytest

from sglang_specforge.curve import Identity
from tests.e2e.conftest import TARGET, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.test_attach import STREAMED, AttachedTrainer
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
    return start("--dtype", "float32", NO_CACHE, training=STREAMED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("far")


@pytest.fixture
def trainer(server, folder):
    """In a process that ends with the test."""
    trainer = far_trainer(server, folder)
    yield trainer
    trainer.end()


def far_trainer(server, folder):
    target = folder / "target"
    if not target.exists():
        shutil.copytree(TARGET, target)
    flags = ("--listen", f"tcp://127.0.0.1:{free_port()}", "--target", target)
    return AttachedTrainer([server], folder / "run", ("-c", ELSEWHERE), flags)


def free_port():
    """With the next one free as well, most likely."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return min(listening.getsockname()[1], 65534)


def reader(server, name="127.0.0.1"):
    return {
        "spans_endpoint": f"tcp://{name}:{free_port()}",
        "control_endpoint": f"tcp://{name}:{free_port()}",
        "key": Identity.new().public,
    }


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
    assert not list((server.run_dir / "uploads").iterdir())
