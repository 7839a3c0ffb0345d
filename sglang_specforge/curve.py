"""ZMQ between machines: encrypted, and each end knows the other by its key (CURVE, rfc.zeromq.org/spec/26)."""

from typing import Annotated, NamedTuple

import zmq
from pydantic import AfterValidator
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from sglang_specforge.sockets import EndpointTaken

_DOMAIN = "draft-training"  # of ZAP
_KEPT_ALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 10, zmq.TCP_KEEPALIVE_INTVL: 5, zmq.TCP_KEEPALIVE_CNT: 3}


def _check_endpoint(endpoint: str) -> str:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    is_host = host[:1].isalnum() and all(c.isascii() and (c.isalnum() or c in ".-") for c in host)
    if not (
        endpoint.startswith("tcp://") and is_host and port.isdecimal() and port.isascii() and 0 < int(port) < 65536
    ):
        raise ValueError("it has to be tcp://HOST:PORT, HOST a name or an IPv4 address")
    return endpoint


def _check_key(key: str) -> str:
    try:
        decoded = z85.decode(key.encode("ascii"))
    except (ValueError, KeyError, UnicodeError):
        decoded = b""
    if len(decoded) != 32:
        raise ValueError("it has to be a public key of CURVE, 40 characters of Z85")
    return key


Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
Key = Annotated[str, AfterValidator(_check_key)]


class Identity(NamedTuple):
    """A pair of CURVE keys, in Z85."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> "Identity":
        return cls(*(key.decode() for key in zmq.curve_keypair()))


def connect(socket: zmq.Socket, endpoint: str, own: Identity, peer: str) -> None:
    """Connect to whoever holds the secret of the public key ``peer``, and to nobody else."""
    socket.curve_publickey, socket.curve_secretkey = own.public.encode(), own.secret.encode()
    socket.curve_serverkey = peer.encode()
    _watch_over(socket)
    socket.connect(endpoint)


class Door:
    """The context of sockets that only the holder of one key may connect to."""

    def __init__(self, own: Identity, admitted: str) -> None:
        self.context = zmq.Context()
        self._own, self._admitted = own, admitted.encode()
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """pyzmq asks for each connection."""
        return key == self._admitted

    def bind(self, socket: zmq.Socket, endpoint: str) -> None:
        """Raises EndpointTaken: another process has the port, or this machine not the address."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._own.public.encode(), self._own.secret.encode()
        socket.zap_domain = _DOMAIN.encode()
        _watch_over(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise EndpointTaken(f"{endpoint} cannot be listened at: {error.strerror}; give another --listen") from error

    def close(self) -> None:
        """And the sockets."""
        self._authenticator.stop()
        self.context.destroy(linger=0)


def _watch_over(socket: zmq.Socket) -> None:
    """A machine that is gone says no goodbye. The kernels see to it: a reader in a long step, whose queue is full,
    answers none of ZMQ's own heartbeats and would be cut off; where it sends them, libzmq aborts its process once the
    other end goes (zeromq/libzmq#4841).
    """
    for option, value in _KEPT_ALIVE.items():
        socket.setsockopt(option, value)
