"""Write the results of bench_gpu.py as tables between two markers of a document."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_plan import ARMS, WORKLOADS

BEGIN, END = "<!-- measured: bench_gpu.py --table writes this -->", "<!-- measured: end -->"
_RESAMPLES = 10_000
_PARALLEL = {"": "", "tp": ", tensor parallel on two cards", "dp": ", data parallel on two cards"}

Line = dict[str, Any]


def write_table(results: Path, document: Path) -> None:
    """Replace what stands between the markers."""
    text = document.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{document} lacks the lines {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    document.write_text(f"{head}{BEGIN}\n\n{tables(lines)}\n{END}{tail}")
    print(f"{document} has the results of {results}")


def tables(lines: list[Line]) -> str:
    """Everything that results say, in Markdown."""
    lines = newest(lines)
    parts = ["\n".join(_sessions(lines)), "\n".join(_whole(lines))]
    shapes = sorted({_what(line) for line in lines if "shape" in line})
    for name, layers, parallel in shapes:
        mine = [line for line in lines if _what(line) == (name, layers, parallel)]
        of = next(line["of"] for line in mine)
        cut = "" if of == layers else f", {layers} of its {of} layers"
        parts.append(f"### {name}{cut}{_PARALLEL[parallel]}")
        makers: list[Callable[[list[Line]], list[str]]] = [
            _throughput,
            _writing,
            _dropping,
            _memory,
            _latency,
            _failures,
        ]
        parts += ["\n".join(made) for make in makers if (made := make(mine))]
    return "\n\n".join(parts) + "\n"


def newest(lines: list[Line]) -> list[Line]:
    """Of every arm of a workload, the rounds of the sources and method that measured it last."""
    sources = {
        line["session"]: (line["tracer_sha256"], line.get("method", 1))
        for line in lines
        if line["kind"] == "session"
    }
    last = {}
    for line in lines:
        for arm in line.get("arms", ()):
            last[_what(line), line.get("workload"), arm] = sources[line["session"]]
    out = []
    for line in lines:
        if "arms" not in line:
            out.append(line)
            continue
        same = {
            arm: answer
            for arm, answer in line["arms"].items()
            if last[_what(line), line.get("workload"), arm] == sources[line["session"]]
        }
        if same.keys() - {"plain"}:
            # Ratios are to the plain engine of the same round, however old.
            out.append(line | {"arms": {"plain": line["arms"]["plain"]} | same})
    return out


def _what(line: Line) -> tuple[str, int, str]:
    return line.get("shape", ""), line.get("layers", 0), line.get("parallel") or ""


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    draws = rng.choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def _spread(values: list[float], digits: int = 3) -> str:
    """Median, its interval, and the extremes."""
    middle, (low, high) = statistics.median(values), interval(values)
    numbers = [f"{n:.{digits}f}" for n in (middle, low, high, min(values), max(values))]
    return "{} | {} to {} | {} to {}".format(*numbers)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(heads)
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _sessions(lines: list[Line]) -> list[str]:
    """Where and with what: a line for each kind of machine and sources, with the dates."""
    used = {line["session"] for line in lines if line["kind"] in ("round", "http")}
    dates = defaultdict(set)
    for line in lines:
        if line["kind"] == "session" and line["session"] in used:
            gpus = [f"{n} x {name}" for name, n in Counter(line["gpus"]).items()] or ["no GPU"]
            versions = ", ".join(f"{name} {number}" for name, number in line["versions"].items())
            said = f"{' and '.join(gpus)}; {line['cpu']}; {versions}; tracer sources "
            dates[said + line["tracer_sha256"]].add(line["date"][:10])
    return [f"- {', '.join(sorted(days))}: {said}." for said, days in dates.items()]


def _by_arm(lines: list[Line]) -> dict[tuple[str, str], list[tuple[Line, Line]]]:
    """{(workload, arm): [(answer, the plain engine's answer of the same round and card)]}."""
    return _pairs(lines, lambda _: "plain")


def _of_own_engine(arm: str) -> str:
    """The arm in which the same process runs and nothing is asked of it."""
    return {"ours": "idle", "steerable": "steerable"}.get(ARMS[arm].engine, "")


def _pairs(
    lines: list[Line], other: Callable[[str], str]
) -> dict[tuple[str, str], list[tuple[Line, Line]]]:
    out = defaultdict(list)
    for line in lines:
        if line["kind"] == "round":
            for arm, answer in line["arms"].items():
                if other(arm) in line["arms"]:
                    out[line["workload"], arm].append((answer, line["arms"][other(arm)]))
    order = list(ARMS)
    names = list(WORKLOADS)
    return dict(sorted(out.items(), key=lambda i: (names.index(i[0][0]), order.index(i[0][1]))))


def _whole(lines: list[Line]) -> list[str]:
    """The ratios of all workloads together, of which there are enough to tell one per cent."""
    groups: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "round":
            shape, _, parallel = _what(line)
            groups[2 if parallel else 0, f"{shape}{_PARALLEL[parallel]}"].append(line)
            if not parallel:
                groups[1, "all on one card"].append(line)
    rows = []
    for (_, name), mine in sorted(groups.items()):
        for arm in [arm for arm in ARMS if arm not in ("plain", "drop", "steermoe")]:
            cells = []
            for other in ("plain", _of_own_engine(arm)):
                ratios = [
                    _rate(answer) / _rate(basis)
                    for (_, one), pairs in _pairs(mine, lambda _, other=other: other).items()
                    for answer, basis in pairs
                    if one == arm and other != arm
                ]
                low, high = interval(ratios) if ratios else (0.0, 0.0)
                middle = statistics.median(ratios) if ratios else 0.0
                cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})" if ratios else "")
                if other == "plain":
                    count = len(ratios)
            if count:
                rows.append([name, arm, f"{count}", *cells])
    return _table(["Shape", "Arm", "rounds", "to plain", "to own"], rows)


def _rate(answer: Line, *more: str) -> float:
    return answer["tokens"] / (answer["seconds"] + sum(answer[name] for name in more))


def _throughput(lines: list[Line]) -> list[str]:
    sizes = {line["workload"]: line["size"] for line in lines if line["kind"] == "round"}
    rows, own = [], _pairs(lines, _of_own_engine)
    for (workload, arm), pairs in _by_arm(lines).items():
        rates = statistics.median(_rate(mine) for mine, _ in pairs)
        cells = [f"{workload}: {sizes[workload]}", arm, f"{rates:,.0f}", f"{len(pairs)}"]
        if arm == "plain":
            rows.append([*cells, "1 | | ", "", ""])
            continue
        cells.append(_spread([_rate(mine) / _rate(plain) for mine, plain in pairs]))
        same = [_rate(mine) / _rate(asleep) for mine, asleep in own.get((workload, arm), [])]
        asked = same and _of_own_engine(arm) != arm
        cells.append(f"{statistics.median(same):.3f}" if asked else "")
        to_disk = [
            _rate(mine, "to_disk_s") / _rate(plain) for mine, plain in pairs if "to_disk_s" in mine
        ]
        rows.append([*cells, f"{statistics.median(to_disk):.3f}" if to_disk else ""])
    heads = ["Workload", "Arm", "tokens/s", "rounds", "ratio", "95 %", "all rounds"]
    heads += ["to own", "to disk"]
    return _table(heads, rows) if rows else []


def _writing(lines: list[Line]) -> list[str]:
    """What tracing everything asked of the disk and of the writer process."""
    rows = []
    for (workload, arm), pairs in _by_arm(lines).items():
        mine = [answer for answer, _ in pairs if "to_disk_s" in answer]
        if not mine or arm == "drop":
            continue
        total = sum(answer["rows"] for answer in mine)
        rows.append(
            [
                workload,
                arm,
                f"{total:,}",
                f"{sum(answer['dropped_rows'] for answer in mine)}",
                "yes" if all(answer["exact"] for answer in mine) else "NO",
                f"{sum(answer['bytes'] for answer in mine) / total:.0f}",
                f"{sum(answer['writer_cpu_s'] for answer in mine) / total * 1e6:.1f}",
                f"{max(answer['behind_rows'] for answer in mine):,}",
                f"{statistics.median(answer['to_disk_s'] for answer in mine):.2f}",
                f"{max(answer['writer_memory_bytes'] for answer in mine) / 2**20:.0f}",
            ]
        )
    heads = ["Workload", "Arm", "rows", "dropped", "every token has its row", "bytes/token"]
    heads += ["writer's CPU s per million tokens", "rows behind at the end (most)"]
    heads += ["seconds until on disk (median)", "writer's memory, MiB (most)"]
    return _table(heads, rows) if rows else []


def _dropping(lines: list[Line]) -> list[str]:
    said = []
    for (workload, arm), pairs in _by_arm(lines).items():
        if arm == "drop":
            answers = [answer for answer, _ in pairs]
            rows, dropped = (sum(a[name] for a in answers) for name in ("rows", "dropped_rows"))
            tokens = sum(answer["tokens"] for answer in answers)
            exact = all(answer["exact"] for answer in answers)
            said.append(
                f"A writer that is too slow, policy drop, {workload}: of {tokens:,} rows {rows:,} "
                f"were stored and {dropped:,} counted as dropped, "
                f"{'none missing' if exact else 'AND THE SUM IS WRONG'}."
            )
    return said


def _memory(lines: list[Line]) -> list[str]:
    """Device memory that is ours, by engine; the ring is on the host."""
    at_start = {line["engine"]: line for line in lines if line["kind"] == "engine"}
    traced = [a for (_, arm), pairs in _by_arm(lines).items() for a, _ in pairs if arm == "traced"]
    rows = []
    for kind, line in at_start.items():
        if "device_bytes" not in line:
            continue
        more = ""
        if "allocated_bytes" in line and "plain" in at_start:
            difference = line["allocated_bytes"] - at_start["plain"]["allocated_bytes"]
            more = f"{difference / 2**20:.1f}"
        rows.append([kind, f"{line['device_bytes'] / 2**20:.1f}", more])
    if traced:
        ours, ring = (max(a[name] for a in traced) for name in ("device_bytes", "ring_bytes"))
        rows.append([f"ours, while tracing (ring: {ring >> 20} MiB)", f"{ours / 2**20:.1f}", ""])
    heads = ["Engine", "our tensors on the device, MiB", "allocated beyond the plain engine, MiB"]
    return _table(heads, rows) if rows else []


def _latency(lines: list[Line]) -> list[str]:
    rounds = [line for line in lines if line["kind"] == "http"]
    if not rounds:
        return []
    first = rounds[0]
    rows = []
    heads = ["Arm", "requests", "failed", "first token p50, ms", "p99", "between tokens p50, ms"]
    heads += [
        "p99",
        "per token p50, ms",
        "per token p50, ratio",
        "p99",
        "between tokens p50, ratio",
    ]
    heads += ["p99"]
    figures = ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "tpot_ms_p50")
    compared = ("tpot_ms_p50", "tpot_ms_p99", "itl_ms_p50", "itl_ms_p99")
    for arm in sorted(first["arms"], key=list(ARMS).index):
        answers = [line["arms"][arm] for line in rounds if line["arms"][arm]["requests"]]
        if not answers:
            continue
        plains = [line["arms"]["plain"] for line in rounds if line["arms"][arm]["requests"]]
        cells = [
            arm,
            f"{sum(a['requests'] for a in answers)}",
            f"{sum(a['failed'] for a in answers)}",
        ]
        cells += [f"{statistics.median(a[name] for a in answers):.2f}" for name in figures]
        for name in compared if arm != "plain" else ():
            ratios = [a[name] / p[name] for a, p in zip(answers, plains, strict=True)]
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        rows.append(cells + ["1"] * (len(heads) - len(cells)))
    said = [
        f"Over HTTP: {first['rate']:g} requests a second arrive at random, {first['size']} tokens; "
        f"{len(rounds)} rounds of {first['window_s']:g} s an arm.",
        "",
        *_table(heads, rows),
    ]
    for line in lines:
        if line["kind"] == "http-store":
            said += ["", f"Of {line['expected_rows']:,} rows {line['rows']:,} were stored and "]
            said[-1] += f"{line['dropped_rows']:,} dropped."
    return said


def _failures(lines: list[Line]) -> list[str]:
    """Engines and arms that failed, and have not worked since."""
    failed: dict[str, str] = {}
    for line in lines:
        if line["kind"] == "failed":
            texts = line["error"].strip().splitlines()
            named = [text for text in texts if "Error:" in text] or texts
            # An engine's log begins with the cause; an arm's traceback ends with it.
            failed[line.get("arm") or line["engine"]] = named[-1 if "arm" in line else 0].strip()
        for worked in (line["engine"],) if line.get("ready") else line.get("arms", ()):
            failed.pop(worked, None)
    return [f"Failed: {name}: `{text}`" for name, text in failed.items()]
