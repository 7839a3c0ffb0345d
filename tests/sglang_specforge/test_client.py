"""How commands and trainers reach a server, and what they say when they do not."""

import http.server
import re
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import trustme
from typer.testing import CliRunner

from sglang_specforge.cli import app
from sglang_specforge.client import Unanswered, request


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/draft/status" else 404)
        self.end_headers()

    def do_POST(self):
        body = b'{"message": "it is too long"}'
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def authority():
    return trustme.CA()


@contextmanager
def answering(secured=lambda socket: socket):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as plain:
        plain.socket = secured(plain.socket)
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{plain.server_port}"
        plain.shutdown()


@pytest.fixture
def server(authority):
    """Address of one that speaks TLS, with a certificate of an authority that nobody knows."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with answering(lambda socket: context.wrap_socket(socket, server_side=True)) as address:
        yield f"https://{address}"


def test_an_address_may_end_with_a_slash():
    with answering() as address:
        assert request("GET", f"http://{address}/", "/draft/status", None).status_code == 200


def test_traffic_that_is_refused_is_told_why():
    with answering() as address:
        command = ["traffic", "--url", f"http://{address}", "--requests", "1"]
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "400: it is too long" in done.output


def test_a_server_is_trusted_by_the_certificates_that_the_environment_names(server, authority, tmp_path, monkeypatch):
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert request("GET", server, "/draft/status", None).status_code == 200


def test_a_server_that_nobody_vouches_for_is_not_talked_to_and_the_error_says_what_to_do(server, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(Unanswered, match="set SSL_CERT_FILE to a file"):
        request("GET", server, "/draft/status", None)


def test_a_command_that_asks_a_server_does_not_wait_for_torch():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sglang_specforge.cli, sys; print(*sys.modules)"], capture_output=True, text=True
    ).stdout.split()
    assert "sglang_specforge.cli" in loaded
    assert not {"torch", "transformers", "datasets"} & set(loaded)


def test_help_says_what_each_command_is_for_without_loading_it():
    commands = CliRunner().invoke(app, ["--help"]).stdout
    for name, purpose in {"demo": "Show the acceptance length", "capture": "Store the states"}.items():
        assert re.search(rf"{name} +{purpose}", commands)
