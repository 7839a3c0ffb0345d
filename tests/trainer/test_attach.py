"""Which servers a trainer that was started apart takes, and what it says of the others."""

import json
import logging
import shutil
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sglang_specforge.checkpoint import CONTENT_KEY, load_config, save_config
from sglang_specforge.training_settings import Job, Speculation
from sglang_specforge.versions import VersionFolder
from tests.tiny import make_run, make_target
from trainer.attach import AttachedServers, AttachSettings, CannotAttach, Watch
from trainer.cli import main
from trainer.far import Far, Stream


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    return make_run(folder, make_target(folder / "target"))


@pytest.fixture
def job(run, tmp_path):
    settings = AttachSettings(servers=["http://a", "http://b"], run_dir=tmp_path / "run")
    shared = {name: getattr(run, name) for name in ("target_path", "target_fingerprint", "served_dtype", "speculation")}
    return Job(settings=settings, draft_path=str(tmp_path / "draft"), **shared)


class Told(Watch):
    """A server that told of itself before, and is asked no more."""

    def __init__(self, run, silence=""):
        super().__init__("http://a", None)
        self.run, self.silence = run, silence

    def start(self):
        pass


@pytest.fixture
def answering():
    """Starts an HTTP server that answers every request alike; returns its address."""
    started = []

    def start(status, content):
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def signal_handlers():
    """As they were: the trainer's own would keep the tests from being interrupted."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_addresses_are_given_again_and_again_and_counted_once():
    settings = AttachSettings(servers=["http://a:1/", "http://b:2", "http://a:1"])
    assert settings.servers == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_fingerprint": "feedface"}, "has target_fingerprint feedface"),
        ({"served_dtype": "bfloat16"}, "has served_dtype bfloat16"),
        ({"speculation": Speculation(5)}, "has speculation"),
        ({"spans_endpoint": "ipc:///nowhere/spans"}, "another machine"),
    ],
)
def test_a_server_that_does_not_go_with_the_others_is_refused_at_the_start_and_left_out_later(
    run, job, change, message, caplog
):
    servers = AttachedServers(job, [Told(run), Told(run.model_copy(update=change))])
    with pytest.raises(CannotAttach, match=message):
        servers.check()
    with caplog.at_level(logging.ERROR):
        assert servers.streams() == servers.streams() == [Stream(run)]
    assert [message in record.getMessage() for record in caplog.records] == [True]


def test_the_servers_own_run_folder_is_refused(run, job):
    settings = job.settings.model_copy(update={"run_dir": run.run_dir})
    with pytest.raises(CannotAttach, match="give another --run-dir"):
        AttachedServers(job.model_copy(update={"settings": settings}), [Told(run)]).check()


def test_a_run_folder_of_the_same_name_on_another_machine_is_another_one(run, job, tmp_path):
    elsewhere = Told(run.model_copy(update={"spans_endpoint": "ipc:///nowhere/spans"}))
    elsewhere.far = Far("http://a", None, "127.0.0.1", 9, "key", VersionFolder(tmp_path))
    settings = job.settings.model_copy(update={"run_dir": run.run_dir})
    servers = AttachedServers(job.model_copy(update={"settings": settings}), [elsewhere])
    servers.check()
    assert servers.streams() == [elsewhere.stream()]


def test_a_server_that_sends_its_states_elsewhere_is_refused(run, job):
    leased = Told(run)
    leased.leased_to = "tcp://10.0.0.7:7100"
    with pytest.raises(CannotAttach, match="tcp://10.0.0.7:7100"):
        AttachedServers(job, [leased]).check()


def test_ports_that_do_not_suffice_for_the_servers_are_refused():
    with pytest.raises(ValueError, match="no two ports for each of 2 servers"):
        AttachSettings(servers=["http://a", "http://b"], listen="tcp://10.0.0.7:65533")
    with pytest.raises(ValueError, match="give listen as well"):
        AttachSettings(servers=["http://a"], pull="rdma://10.0.0.7/mlx5_0")
    assert AttachSettings(servers=["http://a", "http://b"], listen="tcp://10.0.0.7:65532").address(1)[1] == 65534


def test_a_silent_server_is_as_it_was(run, job):
    gone = run.model_copy(update={"spans_endpoint": "ipc:///removed/spans"})
    assert AttachedServers(job, [Told(gone, silence="does not answer")]).streams() == [Stream(gone)]


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (404, "", "runs without --enable-draft-training"),
        (401, "", "give --api-key"),
        (200, json.dumps({"target": "?"}), "another version of sglang-specforge"),
        (500, "oops", "answered 500: oops"),
    ],
)
def test_a_server_that_cannot_be_attached_to_ends_the_start_with_the_reason(
    answering, tmp_path, capsys, status, content, message
):
    with pytest.raises(SystemExit) as ended:
        main(["attach", "--server", answering(status, content), "--run-dir", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_that_are_missing_or_unknown_end_the_start(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["attach"])
    assert ended.value.code == 2
    assert "Address of a server to train on" in capsys.readouterr().err


def test_the_draft_in_service_is_known_where_it_is_one_and_here(run, job, tmp_path):
    one, other = (shutil.copytree(run.draft_path, tmp_path / name) for name in ("one", "other"))
    a, b, refused = Told(run), Told(run), Told(run.model_copy(update={"served_dtype": "bfloat16"}))
    a.serves, b.serves = Path(run.draft_path), one
    servers = AttachedServers(job, [a, b, refused])
    assert servers.served() == Path(run.draft_path)
    config = load_config(other)
    save_config(other, {**config, CONTENT_KEY: "of other weights"})
    for serves in (other, tmp_path / "gone", None):
        b.serves = serves
        assert servers.served() is None
    b.silence = "does not answer"
    assert servers.served() == Path(run.draft_path)
    assert AttachedServers(job, []).served() is None
