"""The CPU image without a Docker engine: its Dockerfile's steps, and then what it starts.

Done for real, step by step as the Dockerfile has them: the build context as .dockerignore leaves
it, COPY (from the context and between stages), the environment, the virtual environment, the wheel
built from the tree and installed, the links, and ENTRYPOINT with CMD as process 1 of process and
network namespaces of its own, watched by the HEALTHCHECK command and stopped by STOPSIGNAL.
Absolute paths of the image lie under a scratch folder.

Stands in for a gigabyte of downloads: the two `pip install` steps of torch and of the lock link the
same packages, in the very versions that the lock names, from the environment that runs the tests,
and nothing else that is there; so a package that the image lacks is missing here too.

Not done: FROM (this machine's Python instead), apt-get, useradd, and USER (the test's own user).
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

from moescope.analysis import open_store

pytestmark = [pytest.mark.engine, pytest.mark.fleet]

TREE = Path(__file__).parents[2]
DOCKERFILE = TREE / "deploy/docker/cpu.Dockerfile"
OF_THE_IMAGE = re.compile(r"(?<![\w.])/(opt/moescope|usr/local/bin|build|data|models)\b")
NOT_DONE = ("apt-get ", "rm -rf /var/lib/apt/", "useradd ")
AS_ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
NAMESPACES = ["unshare", *AS_ROOT, "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
POSSIBLE = all(map(shutil.which, ("unshare", "nsenter", "ip"))) and not subprocess.call(
    [*NAMESPACES, "ip", "link", "set", "lo", "up"], stderr=subprocess.DEVNULL
)


class Image:
    """What the Dockerfile makes, under `root`."""

    def __init__(self, folder):
        self.root, self.context, self.stages = folder / "root", folder / "context", {}
        copy_context(DOCKERFILE.with_name(f"{DOCKERFILE.name}.dockerignore"), self.context)
        do = {"FROM": self.begin, "RUN": self.run, "COPY": self.copy}
        do |= {"WORKDIR": self.workdir, "ENV": self.set_env, "COMMENT": lambda _: None}
        for step in DockerfileParser(path=str(DOCKERFILE)).structure:
            name, value = step["instruction"], step["value"]
            if name in do:
                do[name](value)
            else:
                self.said[name] = value

    def inside(self, text):
        """Text with the image's absolute paths where they are here."""
        return OF_THE_IMAGE.sub(lambda match: f"{self.root}{match[0]}", text)

    def path(self, name):
        """Where a path of the image is here."""
        return self.root / (self.cwd / name).relative_to("/")

    def environment(self):
        # What the tests' own environment says of vLLM and moescope is not the image's.
        ours = ("VLLM_", "MOESCOPE_", "PYTHON", "HF_", "VIRTUAL_ENV")
        given = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return given | {name: self.inside(value) for name, value in self.env.items()}

    def run(self, value):
        (self.root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
        for command in re.split(r"\s*&&\s*", value):
            if command.startswith(NOT_DONE):
                continue
            if command.startswith("pip install --no-deps --index-url"):
                self.link([command.split()[-1]])
            elif command == "pip install --no-deps -r image.lock":
                self.link(self.path("image.lock").read_text().splitlines())
            else:
                if os.geteuid() != 0:
                    command = re.sub(r"--(owner|group) \d+ ", "", command)
                self.bash(self.inside(command))

    def bash(self, command):
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.path("."),
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def link(self, lines):
        """What `pip install --no-deps` of these would bring, from the tests' environment."""
        [site] = self.path("/opt/moescope").glob("lib/python*/site-packages")
        for requirement in map(Requirement, filter(None, lines)):
            if requirement.marker is None or requirement.marker.evaluate():
                if list(site.glob(f"{requirement.name}-*.dist-info")):  # venv's own
                    self.bash(f"pip uninstall --quiet --yes {requirement.name}")
                link_package(requirement, site, self.path("/opt/moescope/bin"))

    def copy(self, value):
        words = shlex.split(value)
        options = dict(word[2:].split("=") for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        base = self.stages.get(options.get("from"), self.context)
        found = [path for source in sources for path in base.glob(source.lstrip("/"))]
        assert len(found) >= len(sources), f"COPY {value}: the context lacks one"
        to = self.path(target)
        into = target.endswith("/")
        for source in found:
            place = to / source.name if into else to
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, symlinks=True)
            else:
                shutil.copy(source, place)
                place.chmod(int(options.get("chmod", "644"), 8))

    def begin(self, value):
        if self.root.exists():
            self.stages[self.stage] = self.root.rename(self.root.with_name(self.stage))
        self.root.mkdir()
        self.stage = value.split(" AS ")[1] if " AS " in value else "image"
        self.cwd, self.env, self.said = Path("/"), {"PATH": os.environ["PATH"]}, {}

    def workdir(self, value):
        self.cwd = Path(value)
        self.path(".").mkdir(parents=True, exist_ok=True)

    def set_env(self, value):
        for word in shlex.split(value):
            name, text = word.split("=", 1)
            self.env[name] = text.replace("$PATH", self.env["PATH"])


def copy_context(ignore, target):
    """The tree as the engine gets it: the last rule of the file that fits decides."""
    rules = [line for line in ignore.read_text().splitlines() if line and line[0] != "#"]

    @cache
    def kept(path):
        result = kept(path.parent) if path.parent != Path() else True
        for rule in rules:
            pattern = rule.lstrip("!").removeprefix("**/")
            name = path.name if "**/" in rule else str(path)
            if fnmatch(name, pattern) and name.count("/") == pattern.count("/"):
                result = rule.startswith("!")
        return result

    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        files = subprocess.run(listed, cwd=TREE, capture_output=True, check=True).stdout.decode()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs the tree's git")
    for name in filter(None, files.split("\0")):
        if kept(Path(name)) and (TREE / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TREE / name, target / name)


@cache
def owners():
    """How many packages have files in each folder of site-packages."""
    counts = {}
    for package in importlib.metadata.distributions():
        for folder in {file.parts[0] for file in package.files or () if len(file.parts) > 1}:
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def link_package(requirement, site, bin_folder):
    package = importlib.metadata.distribution(requirement.name)
    assert requirement.specifier.contains(package.version), (
        f"{requirement} is locked, {package.version} is installed"
    )
    for file in package.files:
        first = file.parts[0]
        source = Path(package.locate_file(file))
        if first == "..":
            if source.parent.name == "bin" and source.is_file():
                install_script(source, bin_folder / source.name)
        elif first == "__pycache__":
            continue
        elif len(file.parts) > 1 and owners()[first] == 1:
            with suppress(FileExistsError):
                (site / first).symlink_to(package.locate_file(first))
        elif source.is_file():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # some files come with two packages
                (site / file).symlink_to(source)


def install_script(source, target):
    """A command of a package, for the new environment's Python."""
    text = source.read_bytes()
    if text.startswith(b"#!") and b"python" in text.split(b"\n")[0]:
        text = b"#!%s/python\n" % os.fsencode(target.parent) + text.split(b"\n", 1)[1]
    target.write_bytes(text)
    target.chmod(0o755)


class Container:
    """The image's command as process 1 of its own namespaces."""

    def __init__(self, image, folder):
        self.image, self.log = image, folder / "container.log"
        command = [
            image.inside(word) for name in ("ENTRYPOINT", "CMD") for word in said(image, name)
        ]
        environment = image.environment() | {
            "MOESCOPE_ADMIN_KEY": "key-of-the-test",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
        }
        up = 'ip link set lo up; exec "$@"'
        with self.log.open("w") as output:
            self.outer = subprocess.Popen(
                [*NAMESPACES, "sh", "-c", up, "sh", *command],
                cwd=image.path("."),
                env=environment,
                stdout=output,
                stderr=output,
            )

    def first(self):
        """Process 1, by its number here."""
        children = (
            Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()
        )
        return int(children[0])

    def execute(self, command):
        """A command inside, as `docker exec` or a health check; (status, output)."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        done = subprocess.run(
            ["nsenter", "--target", str(self.first()), "--net", *user, *command],
            env=self.image.environment(),
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def healthy(self):
        value = self.image.said["HEALTHCHECK"]
        return self.execute(json.loads(value[value.index("CMD ") + 4 :]))[0] == 0

    def get(self, path, body=None, **headers):
        """What the server answers inside."""
        script = (
            "import sys, json, urllib.request as u; "
            "url, data, headers = map(json.loads, sys.argv[1:]); "
            "asked = u.Request(url, data and data.encode(), headers); "
            "print(u.urlopen(asked).read().decode())"
        )
        data = None if body is None else json.dumps(body)
        headers |= {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:8000{path}"
        status, text = self.execute(
            ["python", "-c", script, *map(json.dumps, (url, data, headers))]
        )
        assert status == 0, text
        return text

    def wait(self):
        deadline = time.monotonic() + 600
        while not self.healthy():
            assert self.outer.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(2)  # each look starts a Python

    def stop(self):
        os.kill(self.first(), signal.Signals[self.image.said["STOPSIGNAL"]])
        return self.outer.wait(timeout=60)


def said(image, name):
    return json.loads(image.said[name])


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return Image(tmp_path_factory.mktemp("image"))


def test_the_image_has_its_commands(image):
    for name in ("moescope", "ray"):
        command = image.path(f"/usr/local/bin/{name}")
        assert command.resolve() == image.path(f"/opt/moescope/bin/{name}").resolve()
        # As in a login shell: without the image's PATH.
        assert subprocess.run([command, "--help"], capture_output=True).returncode == 0
    packages = image.bash("pip list --format freeze").split()
    assert f"moescope=={importlib.metadata.version('moescope')}" in packages
    assert not [line for line in packages if line.startswith(("pytest==", "triton=="))]
    # The package in the image, not the tree's.
    where = image.bash("cd /; python -c 'import moescope.tracer as t; print(t.__file__)'")
    assert where.startswith(str(image.root))


@pytest.mark.skipif(
    not POSSIBLE, reason="needs unshare, nsenter and ip, and leave to make namespaces"
)
def test_the_container_serves_is_watched_and_ends_in_order(image, tmp_path):
    container = Container(image, tmp_path)
    try:
        time.sleep(0.5)
        assert not container.healthy()
        container.wait()
        body = {"model": "specimen", "prompt": "Where is the lamp?", "max_tokens": 4}
        container.get("/v1/completions", body, **{"X-Trace-Run": "contained"})
        check_metrics(container.get("/metrics"))
        # Nothing is on disk yet; it is the trace writer's last act, after the server's end.
        assert not list(image.path("/data/traces/requests").glob("*.parquet"))
        assert container.stop() == 0, container.log.read_text()
    finally:
        container.outer.kill()
        container.outer.wait()
    [[run, complete]] = (
        open_store(image.path("/data/traces")).sql("SELECT run, complete FROM requests").fetchall()
    )
    assert (run, complete) == ("contained", True)


def check_metrics(page):
    """Every metric of the dashboard and of the alerts is on the server's page."""
    there = set(re.findall(r"^([a-z_:]+)[{ ]", page, re.M))
    there |= set(re.findall(r"^# TYPE ([a-z_:]+) ", page, re.M))  # those without a value yet
    deploy = TREE / "deploy"
    dashboard = json.loads((deploy / "grafana/dashboards/moescope.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    queries.append((deploy / "prometheus/moescope.rules.yml").read_text())
    named = {name for query in queries for name in re.findall(r"(?:moescope_|vllm:)[a-z_]+", query)}
    assert len(named) > 15
    assert named <= there, f"not on /metrics: {sorted(named - there)}"
