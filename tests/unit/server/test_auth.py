import hmac
from contextlib import suppress

import pytest
from starlette.requests import HTTPConnection

from moescope.server import auth
from moescope.server.auth import Gate, check_exposure, is_loopback, key_id
from moescope.server.errors import AuthError
from moescope.tracer.errors import InputError


def connection(client=("127.0.0.1", 5), **headers):
    headers.setdefault("host", "localhost:8000")
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "client": client, "headers": raw})


def test_the_admin_key_opens():
    assert Gate("s3cret").admit(connection(authorization="Bearer s3cret")) == key_id("s3cret")
    assert Gate("s3cret").admit(connection(("10.0.0.9", 1), authorization="bearer s3cret"))


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret ", "Basic s3cret", "s3cret",
               "Bearer \xff", "Bearer s3cret, Bearer s3cret"]
)  # fmt: skip
def test_nothing_else_does_even_from_this_machine(header):
    with pytest.raises(AuthError, match="admin key"):
        Gate("s3cret").admit(connection(authorization=header))
    with pytest.raises(AuthError):
        Gate("s3cret").admit(connection())


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared, compare = [], hmac.compare_digest

    def spy(a, b):
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", spy)
    gate = Gate("s3cret")
    for header in ("Bearer s3cret", "Bearer x", "Basic s3cret", ""):
        with suppress(AuthError):
            gate.admit(connection(authorization=header))
    assert compared == [(32, 32)] * 4


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_without_a_key_this_machine_is_let_in(host):
    assert Gate(None).admit(connection((host, 1))) == "loopback"


@pytest.mark.parametrize("client", [("10.0.0.9", 1), ("::2", 1), ("::ffff:10.0.0.9", 1), None])
def test_without_a_key_others_are_not(client):
    with pytest.raises(AuthError):
        Gate(None).admit(connection(client))


def test_without_a_key_web_pages_of_elsewhere_are_not():
    Gate(None).admit(connection(origin="http://localhost:3000", host="[::1]:8000"))
    for headers in (
        {"origin": "https://example.com"},
        {"origin": "null"},
        {"origin": "http://localhost.example.com"},
        {"host": "rebound.example.com:8000"},
        {"host": ""},
        {"host": "[::1"},
    ):
        with pytest.raises(AuthError, match="web pages"):
            Gate(None).admit(connection(**headers))


def test_the_servers_address():
    for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        check_exposure(host, None, None)
    for host in (None, "", "0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com"):
        assert not is_loopback(host)
        with pytest.raises(InputError, match="admin key"):
            check_exposure(host, None, None)
        check_exposure(host, None, "key")
    with pytest.raises(InputError, match="/tmp/socket"):
        check_exposure("127.0.0.1", "/tmp/socket", None)


def test_the_id_of_a_key_is_stable_and_does_not_hold_it():
    assert key_id("s3cret") == key_id("s3cret")
    assert key_id("s3cret") != key_id("other")
    assert "s3cret" not in key_id("s3cret")
    assert len(key_id("s3cret")) == len("key:") + 8
