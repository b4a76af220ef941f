from argparse import Namespace
from importlib.metadata import entry_points

import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from moescope.server import settings
from moescope.server.middleware import SteeringMiddleware
from moescope.server.plugin import ControlPlane
from moescope.server.settings import ServerSettings
from moescope.tracer.errors import InputError


@pytest.fixture
def attach(monkeypatch, tmp_path):
    """`attach(key, **args)`: the application after the plugin."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def run(key="s3cret", masks=tmp_path, **args):
        given = ServerSettings(masks=masks, admin_key=None if key is None else SecretStr(key))
        monkeypatch.setattr(settings, "_given", given)
        app = FastAPI()
        base = {
            "host": "127.0.0.1",
            "uds": None,
            "api_server_count": None,
            "data_parallel_size": 1,
            "api_key": None,
        }
        app.state.args = Namespace(**base | args)
        ControlPlane().attach_router(app)
        return app

    return run


def test_vllm_finds_it():
    [point] = entry_points(group="vllm.endpoint_plugins", name="moescope")
    assert point.load() is ControlPlane


def test_routes_and_middleware(attach):
    app = attach()
    assert "/v1/masks/{name}" in app.openapi()["paths"]
    assert [m.cls for m in app.user_middleware] == [SteeringMiddleware]
    assert app.state.args.api_key is None  # a server that is open for inference stays so


def test_vllms_own_keys_let_the_admin_key_pass(attach, monkeypatch):
    assert attach(api_key=["a", "b"]).state.args.api_key == ["a", "b", "s3cret"]
    assert attach(None, api_key=["a"]).state.args.api_key == ["a"]
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    assert attach().state.args.api_key == ["from-environment", "s3cret"]


def test_without_a_folder_of_masks_it_does_nothing(attach):
    app = attach(masks=None, host="0.0.0.0", key=None)
    assert app.user_middleware == []
    assert app.openapi()["paths"] == {}


def test_an_open_server_is_refused(attach):
    with pytest.raises(InputError, match="admin key"):
        attach(None, host="0.0.0.0")
