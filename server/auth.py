"""Who may use the control plane: those with the admin key, or without one this machine alone."""

import hashlib
import hmac
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from moescope.server.errors import AuthError
from moescope.tracer.errors import InputError

LOOPBACK = "loopback"


class Gate:
    """Lets callers in, or raises AuthError."""

    def __init__(self, admin_key: str | None) -> None:
        # Digests have one length, so that comparing them tells nothing of the key's.
        self._digest = None if admin_key is None else _digest(admin_key)
        self._key_id = LOOPBACK if admin_key is None else key_id(admin_key)

    def admit(self, connection: HTTPConnection) -> str:
        """Who it is, for the audit log."""
        if self._digest is None:
            _check_local(connection)
            return LOOPBACK
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        matches = hmac.compare_digest(_digest(key), self._digest)
        if scheme.lower() != "bearer" or not matches:
            raise AuthError("this route needs the admin key: Authorization: Bearer KEY")
        return self._key_id


def key_id(admin_key: str) -> str:
    """A short name of a key that does not give it away.

    scrypt, and only 32 bits of it: whoever reads the audit log can neither compute the key nor
    make sure of a guess.
    """
    digest = hashlib.scrypt(admin_key.encode(), salt=b"moescope key id", n=2**14, r=8, p=1, dklen=4)
    return f"key:{digest.hex()}"


def check_exposure(host: str | None, uds: str | None, admin_key: str | None) -> None:
    """Refuse to open the control plane to others without a key; vLLM takes no host for all."""
    if admin_key is None and (uds or not is_loopback(host)):
        where = uds or host or "every address (no --host)"
        raise InputError(
            f"the server would listen on {where}, and whoever reaches it could change masks: set "
            "an admin key (--admin-key or MOESCOPE_ADMIN_KEY), or use --host 127.0.0.1"
        )


def is_loopback(host: str | None) -> bool:
    """Whether an address is this machine's own; names count as such only if they are localhost."""
    if host == "localhost":
        return True
    try:
        address: IPv4Address | IPv6Address = ip_address((host or "").strip("[]"))
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _check_local(connection: HTTPConnection) -> None:
    """A caller on this machine, and not a web page that its browser shows.

    Such a page may come from elsewhere (`Origin`), or its name may have been made to point here
    (`Host`).
    """
    client = connection.client
    if client is None or not is_loopback(client.host):
        raise AuthError(
            "without an admin key only clients on the server's own machine may use this route: "
            "start the server with --admin-key or MOESCOPE_ADMIN_KEY"
        )
    origin = connection.headers.get("origin")
    for name in (f"//{connection.headers.get('host', '')}", origin):
        if name is not None and not is_loopback(_host_of(name)):
            raise AuthError(
                "without an admin key this route is for callers of localhost, not for web pages "
                "of other origins"
            )


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
