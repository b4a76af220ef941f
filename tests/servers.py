"""Real `moescope serve` processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import openai
from engines import traced_rows
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from moescope.analysis import open_store

PROMPT = [11, 12, 13, 14]


class Server:
    """A `moescope serve` process."""

    def __init__(
        self,
        folder,
        model,
        *options,
        key=None,
        api_key=None,
        host="127.0.0.1",
        name="1",
        slots=2,
        own_mask=None,
    ):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store, self.masks = folder / "traces", folder / "masks"
        self.log = folder / f"server-{name}.log"
        command = [sys.executable, "-m", "moescope.clients.cli", "serve", str(model)]
        command += ["--masks", str(self.masks), "--store", str(self.store)]
        command += ["--slots", str(slots), "--host", host, "--port", str(self.port)]
        if own_mask is not None:
            command += ["--own-mask", own_mask]
        if api_key is not None:
            command += ["--api-key", api_key]
        command += ["--", "--served-model-name", "specimen", "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "4096", *options]
        environment = os.environ | {
            "MOESCOPE_FLUSH_SECONDS": "0.1",
            # Or else the engine's output thread starves on cores that OpenMP has pinned.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        if key is not None:
            environment["MOESCOPE_ADMIN_KEY"] = key
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.admin = httpx.Client(base_url=self.url, timeout=60)
        if key is not None:
            self.admin.headers["Authorization"] = f"Bearer {key}"
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0
        )

    def wait(self, timeout_s=180):
        deadline = time.monotonic() + timeout_s
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.1)

    def listens(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def put(self, name, *experts, **fields):
        """Deactivate experts in every layer."""
        entries = [
            {"layer": layer, "expert": e, "action": "deactivate"}
            for layer in fields.pop("layers", range(4))
            for e in experts
        ]
        mask = {"name": name, "entries": entries} | fields
        return self.admin.put(f"/v1/masks/{name}", json=mask)

    def complete(self, mask=None, example=None, headers=(), **fields):
        """(headers, text) of one completion."""
        headers = dict(headers)
        if mask is not None:
            headers["X-Steering-Mask"] = mask
        if example is not None:
            headers["X-Trace-Run"] = fields.pop("run", "run")
            fields["extra_body"] = {
                "ignore_eos": True,
                "vllm_xargs": {"moescope_example_id": example},
            }
        given = {"model": "specimen", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        raw = self.openai.completions.with_raw_response.create(
            **given | fields, extra_headers=headers
        )
        return raw.headers, raw.parse()

    def rows(self, examples, run="run"):
        """The experts of these examples' rows, when they are all on disk: {example: [n, L, k]}."""
        deadline = time.monotonic() + 30
        while True:
            if list(self.store.glob("requests/[!.]*")):
                rows = traced_rows(self.store, run)
                if rows.keys() >= set(examples):
                    return {example: rows[example][1] for example in examples}
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def masks_of(self, example):
        """What the trace says was in force, token by token."""
        rows = open_store(self.store).execute(
            "SELECT tokens.mask FROM tokens JOIN requests USING (request_id) "
            "WHERE example_id = ? ORDER BY position",
            [example],
        )
        return [mask for (mask,) in rows.fetchall()]

    def scrape(self):
        """{(name, label value or None): value} of our metrics."""
        page = httpx.get(f"{self.url}/metrics")
        assert page.status_code == 200
        return {
            (sample.name, next(iter(sample.labels.values()), None)): sample.value
            for family in text_string_to_metric_families(page.text)
            for sample in family.samples
            if sample.name.startswith("moescope_") and sample.name != "moescope_build_info"
        }

    def slots_in_use(self):
        return self.admin.get("/v1/moe").json()["slots"]["in_use"]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        finally:
            # With the engine, which outlives a server that was killed.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.admin.close()
