"""How commands and trainers reach a server, and what they say when they do not."""

import http.server
import ssl
import threading

import pytest
import trustme

from sglang_specforge.client import Unanswered, request


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def server(authority):
    """Address of one that speaks TLS, with a certificate of an authority that nobody knows."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as plain:
        plain.socket = context.wrap_socket(plain.socket, server_side=True)
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{plain.server_port}"
        plain.shutdown()


def test_a_server_is_trusted_by_the_certificates_that_the_environment_names(server, authority, tmp_path, monkeypatch):
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert request("GET", server, "/draft/status", None).status_code == 200


def test_a_server_that_nobody_vouches_for_is_not_talked_to_and_the_error_says_what_to_do(server, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(Unanswered, match="set SSL_CERT_FILE to a file"):
        request("GET", server, "/draft/status", None)
