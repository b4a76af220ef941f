from argparse import Namespace

import pytest
from object_servers import S3Server

from moescope.server.plugin import check_arguments
from moescope.server.serve import prepare_environment, serve
from moescope.server.settings import load_server_settings
from moescope.tracer.errors import InputError, StoreError


def arguments(**fields):
    given = {"host": "127.0.0.1", "uds": None, "api_server_count": None, "data_parallel_size": 1}
    return Namespace(**given | fields)


def test_nothing_has_to_be_set_by_hand(tmp_path):
    environment = {"MOESCOPE_ADMIN_KEY": "s3cret"}
    prepare_environment(environment, store=tmp_path, slots=3, own_mask="compose")
    assert environment["MOESCOPE_STORE"] == str(tmp_path)
    assert environment["MOESCOPE_OWN_MASK"] == "compose"
    assert environment["MOESCOPE_SLOTS"] == "3"
    assert environment["MOESCOPE_STEER"] == "on"
    assert environment["MOESCOPE_POLICY"] == "drop"
    # The engine's processes have no business with the key.
    assert "s3cret" not in environment.values()
    # Those that vLLM would load unasked are still loaded.
    names = environment["VLLM_PLUGINS"].split(",")
    assert names.count("moescope") == 1
    assert "lora_filesystem_resolver" in names


def test_plugins_that_the_user_named_stay():
    mine = {"MOESCOPE_STEER": "auto", "MOESCOPE_POLICY": "block"}
    environment = {"VLLM_PLUGINS": "mine,other"} | mine
    prepare_environment(environment, store=None, slots=None)
    assert environment == {"VLLM_PLUGINS": "mine,other,moescope"} | mine
    prepare_environment(environment, store=None, slots=None)
    assert environment["VLLM_PLUGINS"] == "mine,other,moescope"
    environment = {"VLLM_PLUGINS": ""}
    prepare_environment(environment, store=None, slots=None)
    assert environment["VLLM_PLUGINS"] == "moescope"


def test_options_that_are_refused():
    check_arguments(arguments(), None)
    check_arguments(arguments(api_server_count=1, host="0.0.0.0"), "key")
    here = {"data_parallel_size_local": 2, "data_parallel_hybrid_lb": False}
    check_arguments(arguments(data_parallel_size=2, data_parallel_rank=None, **here), None)
    for fields, words in [
        ({"host": "0.0.0.0"}, "admin key"),
        ({"host": None}, "every address"),
        ({"uds": "/tmp/s"}, "admin key"),
        ({"api_server_count": 2}, "--api-server-count 2"),
        ({"data_parallel_size": 2, "data_parallel_rank": 0}, "--data-parallel-rank"),
        ({"data_parallel_size": 2, "data_parallel_hybrid_lb": True}, "--data-parallel-hybrid-lb"),
        (
            {"data_parallel_size": 4, "data_parallel_size_local": 2},
            "--data-parallel-size-local 2: of 4",
        ),
        (
            {"data_parallel_size": 2, "data_parallel_backend": "ray"},
            "--data-parallel-backend ray",
        ),
        ({"headless": True}, "--headless"),
        ({"grpc": True}, "--grpc"),
    ]:
        with pytest.raises(InputError, match=words):
            check_arguments(arguments(**fields), None)


@pytest.mark.parametrize("key", ["", "with space", "umlaut-ü", "line\n"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESCOPE_ADMIN_KEY", key)
    with pytest.raises(InputError, match="admin_key must") as error:
        serve("model", masks=tmp_path)
    assert not key or key not in str(error.value)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_bucket_that_is_not_there_is_found_before_the_model_is_loaded(by, tmp_path, monkeypatch):
    storage, url = S3Server(), "s3://no-such-bucket/traces"
    more = {"MOESCOPE_STORE": url, "MOESCOPE_STEER": "on", "MOESCOPE_POLICY": "drop"}
    for name, value in (storage.environment | more | {"VLLM_PLUGINS": ""}).items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(StoreError, match="no bucket 'no-such-bucket'"):
            serve("model", masks=tmp_path, store=url if by == "argument" else None)
    finally:
        storage.close()


def test_settings_come_from_arguments_then_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MOESCOPE_ADMIN_KEY", "from-environment")
    monkeypatch.setenv("MOESCOPE_MASKS", str(tmp_path))
    settings = load_server_settings()
    assert settings.masks == tmp_path
    assert settings.admin_key.get_secret_value() == "from-environment"
    assert "from-environment" not in repr(settings)
    assert load_server_settings(admin_key="given").admin_key.get_secret_value() == "given"
