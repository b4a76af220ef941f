"""Real replicas of the server, behind Ray Serve on this machine."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import openai
import psutil
from ports import free_port
from servers import Server

CLI = [sys.executable, "-m", "moescope.deploy.ray_serve"]


class Replicas(Server):
    """A `python -m moescope.deploy.ray_serve` process; to clients it is one server."""

    def __init__(self, folder, model, *options, key, replicas=2, slots=4, lease_s=3):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store, self.masks = folder / "traces", folder / "masks"
        self.log = folder / "replicas.log"
        command = [*CLI, str(model), "--replicas", str(replicas), "--port", str(self.port)]
        command += ["--masks", str(self.masks), "--store", str(self.store)]
        command += ["--slots", str(slots), "--lease", str(lease_s), "--cpus", "0.5", "--"]
        command += ["--served-model-name", "specimen", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "4096", *options]
        environment = os.environ | {
            "MOESCOPE_ADMIN_KEY": key,
            "MOESCOPE_FLUSH_SECONDS": "0.1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            # Ray kills its workers when the machine's memory is short, whoever has it.
            "RAY_memory_monitor_refresh_ms": "0",
        }
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.admin = httpx.Client(base_url=self.url, timeout=60)
        self.admin.headers["Authorization"] = f"Bearer {key}"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait(self, num=2, timeout_s=300):
        """Come back when so many serve; returns their names."""
        deadline = time.monotonic() + timeout_s
        while len(serving := self.serving()) != num:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        return serving

    def serving(self):
        """The names of those that serve; none where nobody can say so."""
        with suppress(httpx.TransportError):
            answer = self.admin.get("/v1/replicas", timeout=5)
            if answer.status_code == 200:
                return {item["replica"] for item in answer.json()["data"] if item["serves"]}
        return set()

    def insist(self, ask, timeout_s=120):
        """What `ask` gives when it is no more answered by 503."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return ask()
            except openai.InternalServerError as error:
                if error.status_code != 503 or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def processes(self, words):
        """Those of ours whose command line has these words, by age."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass
        return sorted(found, key=lambda process: process.create_time())
