"""A trainer that was started apart: several servers, several processes of its own, and all of them coming and going."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.e2e.conftest import TRAINING, assert_every_token_is_accounted_for, outputs, prompts, settled, wait_for
from tests.e2e.spares import start_trainer
from tests.e2e.test_layouts import NO_CACHE

STREAMED = {"trainer": "none", "draft-vocab-size": 768, "gate": "off"}
LEARNT = {name: value for name, value in TRAINING.items() if name != "gate"}  # the trainer has none
FLAGS = {**LEARNT, "publish-every-s": 2, "replay-tokens": 20000, "epochs-per-token": 1}
del FLAGS["draft-vocab-size"]  # the servers' draft is gone on with


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "trainer")


class AttachedTrainer:
    """``torchrun --nproc-per-node 2 -m trainer attach``, or as ``program`` says; ended with the test."""

    def __init__(self, clients, run_dir, program=TORCHRUN, flags=()):
        command = [*program, "attach", "--run-dir", run_dir]
        command += [part for client in clients for part in ("--server", client.server.url)]
        command += [part for name, value in FLAGS.items() for part in (f"--{name}", value)]
        command = list(map(str, [*command, *flags]))
        self.log, self.metrics = run_dir.with_suffix(".log"), run_dir / "metrics.jsonl"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if program == TORCHRUN:
            with self.log.open("ab") as out:
                self._process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, env=environment)
        else:
            self._process = start_trainer(command, environment, self.log)
        for client in clients:
            wait_for("the trainer reads", lambda client=client: is_read(client))

    def end(self):
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def lines(self):
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]


def is_read(client):
    status = client.status()
    return not any(export["closed"] for export in status["export"]) and status["trainer"]["state"] in (
        "waiting",
        "training",
    )


@pytest.fixture(scope="module")
def servers(start, reference):
    reference()
    flags = ("--dtype", "float32", NO_CACHE)
    return [start(*flags, training=STREAMED), start(*flags, training=STREAMED, beside=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("attached")


@pytest.fixture(scope="module")
def trainer(servers, folder):
    trainer = AttachedTrainer(servers, folder / "run")
    yield trainer
    trainer.end()


def send_to_both(servers, seed, count=24):
    for i, client in enumerate(servers):
        client.generate_all(prompts(count, seed=seed + i), tokens=40)


def test_two_servers_feed_one_draft_in_two_processes_each_sample_once(servers, trainer, reference):
    def both_swapped_twice():
        send_to_both(servers, seed=10 + 2 * len(rounds))
        rounds.append(1)
        return all(client.status()["draft"]["swaps"] >= 2 for client in servers)

    rounds = []
    wait_for("two swaps on each server", both_swapped_twice, 240)
    for client in servers:
        assert outputs(client.generate_all(prompts(50))) == reference()
    for client in servers:
        settled(client)
        wait_for("all of it is trained", lambda client=client: client.status()["trainer"]["state"] == "waiting")
    statuses = [client.status() for client in servers]
    for status in statuses:
        assert_every_token_is_accounted_for(status)
        assert status["tokens"]["trained"] > 0
        assert [export["transport"] for export in status["export"]] == ["shared_memory"]
        assert status["tokens"]["dropped"].keys() <= {"past_finish", "duplicate"}
        assert 0 < status["trainer"]["parity"]["compared"] == status["trainer"]["parity"]["agreed"]
    steps = [line for line in trainer.lines() if "loss" in line]
    shares = [sum(line[f"tokens_rank_{rank}"] for line in steps) for rank in range(2)]
    assert max(shares) <= 1.05 * min(shares)
    # A token came in for each that was drawn: the same prompts, sent to both, pay for their twins.
    repeated = sum(status["tokens"]["dropped"].get("duplicate", 0) for status in statuses)
    trained = sum(status["tokens"]["trained"] for status in statuses)
    assert trained <= sum(shares) <= trained + repeated


def test_a_second_trainer_is_refused_and_told_why(servers, trainer, folder):
    command = [sys.executable, "-m", "trainer", "attach", "--server", servers[0].server.url]
    refused = subprocess.run(
        [*command, "--run-dir", folder / "second"], capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 2
    assert "another process reads the states of this server" in refused.stderr
    assert is_read(servers[0])


def test_trainers_and_servers_leave_and_come_back(servers, trainer, folder):
    send_to_both(servers, seed=50)
    trainer.end()
    send_to_both(servers, seed=60, count=8)
    for client in servers:
        assert [export["closed"] for export in client.status()["export"]] == ["nobody_listening"]

    again = AttachedTrainer(servers, folder / "run")
    try:
        send_to_both(servers, seed=70)
        for client in servers:
            status = settled(client)
            assert status["trainer"]["resumed_from_step"] > 0
            assert_every_token_is_accounted_for(status)

        stays, leaves = servers
        leaves.server.process.kill()
        step = stays.status()["trainer"]["step"]
        wait_for(
            "training without the other",
            lambda: (
                stays.generate_all(prompts(10, seed=stays.status()["tokens"]["captured"]))
                and stays.status()["trainer"]["step"] > step
            ),
        )
        leaves.server.restart()
        wait_for("the server that came back is read", lambda: is_read(leaves))
        wait_for("it serves what was learnt meanwhile", lambda: leaves.status()["draft"]["active_version"] >= 1)
        send_to_both(servers, seed=80, count=10)
        for client in servers:
            status = settled(client)
            assert status["tokens"]["captured"] > 0
            assert_every_token_is_accounted_for(status)
    finally:
        again.end()
