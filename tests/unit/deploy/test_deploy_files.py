"""What is in deploy/ beside Python: linted by real tools, and true to the code that it starts.

No Docker engine, cluster or Prometheus is asked. KubeRay's own schema is
1.3 MB, nearly all of it Kubernetes' pods: here kuberay.schema.json has the fields of KubeRay that
we use, and the pods in them are checked as pods.
"""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import promql_parser
import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("docker/*.Dockerfile"))
KUBERNETES = DEPLOY / "kubernetes"
RAY = [KUBERNETES / "rayjob.yaml", KUBERNETES / "rayservice.yaml"]
SLURM = DEPLOY / "slurm/trace.sbatch"
YAML = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")])
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus/moescope.rules.yml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/moescope.json").read_text())


def run(tool, *arguments):
    """A tool of this environment; its complaints are the assertion's message."""
    command = [str(Path(sys.executable).parent / tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def instructions(dockerfile):
    """(instruction, value) of a Dockerfile, in order."""
    parser = DockerfileParser(path=str(dockerfile))
    return [(step["instruction"], step["value"]) for step in parser.structure]


def last(steps, name):
    return [value for instruction, value in steps if instruction == name][-1]


def accepted(words):
    """Parse `moescope ...` as the command does, without running it; returns the parameters."""
    from moescope.clients.cli import app

    assert words[0] == "moescope"
    command = typer.main.get_command(app).commands[words[1]]
    return command.make_context(words[1], list(words[2:])).params


def interpolated(text):
    """As compose reads it when nothing is set."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


# --- every file ---


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml(path):
    rules = "line-length: {max: 100}, document-start: disable, braces: disable"
    run("yamllint", "--strict", "-d", f"{{extends: default, rules: {{{rules}}}}}", path)


# --- Docker ---


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile(path):
    run("hadolint", path)
    steps = instructions(path)
    bases = [value for name, value in steps if name == "FROM"]
    assert len(bases) == 2
    assert all(re.match(r"python:3\.11\.\d+-slim-bookworm\b", base) for base in bases)
    assert last(steps, "USER") == "10001:10001"
    assert last(steps, "STOPSIGNAL") == "SIGTERM"
    assert "/health" in last(steps, "HEALTHCHECK")
    entry, command = (json.loads(last(steps, name)) for name in ("ENTRYPOINT", "CMD"))
    given = accepted([entry[-1], *command])
    assert (str(given["store"]), str(given["masks"])) == ("traces", "masks")
    assert {"/data/traces", "/data/masks"} <= set(json.loads(last(steps, "VOLUME")))


def test_locks_pin_all_that_moescope_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for lock, backend in (("requirements/cpu.lock", "cpu"), ("deploy/docker/cuda.lock", "gpu")):
        lines = (ROOT / lock).read_text().splitlines()
        pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
        assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)
        version = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
        asked = [*project["dependencies"], *extras[backend], *extras["ray"], *extras["eval"]]
        for requirement in map(Requirement, asked):
            pinned = version[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pinned), f"{lock}: {requirement}, not {pinned}"


def test_the_image_leaves_out_tools_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = [name for name in extras if name not in ("test", "lint", "gpu")]
    todo = [*map(Requirement, project["dependencies"])]
    todo += [Requirement(line) for name in runtime for line in extras[name]]
    needed = set()
    while todo:
        requirement = todo.pop()
        if (name := canonicalize_name(requirement.name), *sorted(requirement.extras)) in needed:
            continue
        needed.add((name, *sorted(requirement.extras)))
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # torchvision and the like, left out
            continue
        todo += [
            one
            for one in map(Requirement, asked)
            if one.marker is None
            or any(one.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, ""))
        ]
    lines = (DEPLOY / "docker/tools.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\^[a-z0-9._-]+==", line) for line in lines)
    tools = {canonicalize_name(line[1:-2]) for line in lines}
    # XGrammar asks for Triton, and imports it for tensors on a GPU.
    assert tools & {name for name, *_ in needed} == {"triton"}


# --- compose, Prometheus, Grafana ---


def test_compose():
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")
    for name, service in COMPOSE["services"].items():
        assert re.search(r":(cpu|cuda|v?\d+\.\d+\.\d+)$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert "healthcheck" in COMPOSE["services"][other]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            there = (DEPLOY / source).is_dir() if source[0] == "." else source in COMPOSE["volumes"]
            assert there, volume
        assert "no-new-privileges:true" in service["security_opt"]
        if name.startswith("server"):
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert service["environment"]["MOESCOPE_ADMIN_KEY"].startswith("${MOESCOPE_ADMIN_KEY:?")
    secrets = [line for line in (DEPLOY / "example.env").read_text().splitlines() if "KEY=" in line]
    assert secrets == ["MOESCOPE_ADMIN_KEY="]


@pytest.mark.parametrize(("service", "image"), [("server", "cpu"), ("server-gpu", "cuda")])
def test_compose_starts_what_the_image_starts(service, image):
    command = shlex.split(interpolated(COMPOSE["services"][service]["command"]))
    usual = json.loads(last(instructions(DEPLOY / f"docker/{image}.Dockerfile"), "CMD"))
    assert command[: len(usual)] == usual
    accepted(["moescope", *command])


def test_prometheus_finds_the_server_and_the_rules():
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [host, port] = job["static_configs"][0]["targets"][0].split(":")
    assert host in COMPOSE["services"]
    assert COMPOSE["services"]["server"]["ports"][0].endswith(f":{port}")
    aliases = COMPOSE["services"]["server-gpu"]["networks"]["default"]["aliases"]
    assert aliases == [host]
    assert all((DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"])
    if promtool := shutil.which("promtool"):  # Debian's package prometheus has it
        subprocess.run(
            [promtool, "check", "config", DEPLOY / "prometheus/prometheus.yml"], check=True
        )


def test_alerts():
    names = [rule["alert"] for group in RULES["groups"] for rule in group["rules"]]
    assert len(names) == len(set(names))
    for group in RULES["groups"]:
        for rule in group["rules"]:
            promql_parser.parse(rule["expr"])
            assert rule["annotations"]["summary"]
            assert rule["labels"]["severity"] in ("critical", "warning")


def test_dashboard():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    [source] = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == source["uid"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == source["uid"]
            query = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            assert "$" not in query
            promql_parser.parse(query)


def test_grafana_finds_the_dashboard():
    path = DEPLOY / "grafana/provisioning/dashboards/moescope.yaml"
    [provider] = yaml.safe_load(path.read_text())["providers"]
    grafana = COMPOSE["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/moescope.json"


# --- Kubernetes ---


def pods():
    """(where, pod's spec) of every pod in the manifests."""
    for document in documents(KUBERNETES / "server.yaml"):
        if document["kind"] == "Deployment":
            yield "server", document["spec"]["template"]["spec"]
    for path in RAY:
        [document] = documents(path)
        spec = document["spec"]
        cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield f"{path.stem}-{group.get('groupName', 'head')}", group["template"]["spec"]


def test_server_manifest():
    run("kubernetes-validate", "--strict", KUBERNETES / "server.yaml")


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.stem)
def test_ray_manifest(path):
    run("check-jsonschema", "--schemafile", Path(__file__).parent / "kuberay.schema.json", path)
    [document] = documents(path)
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}\n" in (DEPLOY / "docker/cuda.lock").read_text()


@pytest.mark.parametrize(("where", "spec"), list(pods()), ids=lambda value: str(value)[:20])
def test_pods(where, spec, tmp_path):
    path = tmp_path / "pod.yaml"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": where}, "spec": spec}
    path.write_text(yaml.safe_dump(pod))
    run("kubernetes-validate", "--strict", path)

    user = last(instructions(DEPLOY / "docker/cuda.Dockerfile"), "USER")
    assert spec["securityContext"]["runAsNonRoot"]
    context = spec["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    [container] = spec["containers"]
    assert container["image"] == COMPOSE["services"]["server-gpu"]["image"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == volumes.keys()
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert {"livenessProbe", "readinessProbe"} <= container.keys()
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    if "args" in container:
        accepted(["moescope", *container["args"]])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rayservice_starts_our_application():
    from ray.serve.schema import ServeDeploySchema

    from moescope.deploy import ray_serve

    [document] = documents(KUBERNETES / "rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    [application] = config.applications
    module, _, function = application.import_path.partition(":")
    assert module == ray_serve.__name__
    assert callable(getattr(ray_serve, function))
    given = ray_serve.read_args(application.args)
    [group] = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert given.replicas == group["replicas"]


def test_rayjob_starts_our_command():
    [document] = documents(KUBERNETES / "rayjob.yaml")
    given = accepted(shlex.split(document["spec"]["entrypoint"]))
    [group] = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (given["ray"], given["replicas"]) == ("auto", group["replicas"])


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not there")
def test_kustomization():
    command = ["kubectl", "kustomize", str(KUBERNETES)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = sorted(document["kind"] for document in yaml.safe_load_all(made))
    assert kinds == sorted(document["kind"] for document in documents(KUBERNETES / "server.yaml"))


# --- Slurm ---


def test_slurm_script():
    run("shellcheck", SLURM)
    script = re.sub(r"\\\n\s*", "", SLURM.read_text())
    [command] = re.findall(r"moescope trace .*", script)
    accepted(shlex.split(command.replace('"$replicas"', "2").replace('"$@"', "")))


def test_slurm_script_explains_itself():
    done = subprocess.run(["bash", SLURM, "job.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "JOB.jsonl MODEL STORE RUN" in done.stderr
