"""Where a process has its Mooncake transfer engine: rdma://HOST, rdma://HOST/DEVICE or tcp://HOST."""

from typing import Annotated, NamedTuple

from pydantic import AfterValidator

_PROTOCOLS = ("rdma", "tcp")


class Place(NamedTuple):
    protocol: str
    host: str
    device: str

    @classmethod
    def of(cls, address: str) -> "Place":
        """Raises ValueError."""
        protocol, _, rest = address.partition("://")
        host, _, device = rest.partition("/")
        if protocol not in _PROTOCOLS or not host or not all(c.isascii() and (c.isalnum() or c in ".-") for c in host):
            raise ValueError("it has to be rdma://HOST, rdma://HOST/DEVICE or tcp://HOST, HOST a name or IPv4 address")
        return cls(protocol, host, device)


def _check(address: str) -> str:
    Place.of(address)
    return address


EngineAddress = Annotated[str, AfterValidator(_check)]
