"""lm-evaluation-harness through a real server, and judges that are real models."""

import json
import math
import sys
import threading
import time

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from ports import free_port
from servers import Server

from moescope.clients.eval_tasks import run_tasks, write_tasks
from moescope.clients.judge import EndpointJudge
from moescope.tracer.errors import InputError

pytestmark = pytest.mark.engine

# Words that the specimen's tokenizer knows, and no right answers: it is random.
QUESTIONS = [f"Where is the lamp in room {i}?" for i in range(24)]
CHOICES = [" the", " a", " of", " and", " to", " in", " is", " by"]

TASKS = {
    "toy_choice": """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "toy_words": """
task: toy_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} Answer:"
doc_to_target: "the"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    lines = [
        {"question": question, "choices": CHOICES, "answer": index % 8}
        for index, question in enumerate(QUESTIONS)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(scope="module")
def server(specimen, tmp_path_factory):
    server = Server(
        tmp_path_factory.mktemp("served"), specimen("qwen3_moe"), slots=2, own_mask="compose"
    )
    try:
        server.wait()
        assert server.put("calm", 1, 2, 3, 4, 5).status_code == 200
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """Nothing is taken from an earlier run, or from the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def likelihoods(server, question, mask):
    """Each choice's log-likelihood, asked for without lm_eval."""
    sums = []
    for choice in CHOICES:
        _, answer = server.complete(
            mask, prompt=f"{question} Answer:{choice}", max_tokens=1, echo=True, logprobs=1
        )
        said = answer.choices[0].logprobs
        start = len(f"{question} Answer:")
        sums.append(
            math.fsum(
                value
                for value, at in zip(said.token_logprobs[:-1], said.text_offset[:-1], strict=True)
                if at >= start
            )
        )
    return sums


def test_base_and_mask_example_by_example(server, tasks, tmp_path, capsys):
    server.put("calm", 1, 2, 3, 4, 5)
    start = time.monotonic()
    run = run_tasks(
        ["toy_choice", "toy_words"], server.url, mask="calm", include_path=tasks, limit=16
    )
    took = time.monotonic() - start
    settings = run.settings
    assert settings["masks"] == {"base": "none", "steered": "calm@1"}
    # 16 examples with 8 choices, and 16 to write.
    assert settings["confirmed_answers"] == {"base": 144, "steered": 144}
    values = {}
    for row in run.outcomes.to_pylist():
        values[row["arm"], row["metric"], row["example_id"]] = row["value"]
    assert len(values) == 2 * 16 * 3
    # lm_eval's own mean, and the choice that the server's own numbers make.
    for arm, mask in (("base", "none"), ("steered", "calm")):
        accuracy = settings["results"][arm]["toy_choice"]["acc,none"]
        mine = [values[arm, "acc", f"toy_choice/{i}"] for i in range(16)]
        assert sum(mine) / 16 == pytest.approx(accuracy)
        for index in range(4):
            sums = likelihoods(server, QUESTIONS[index], mask)
            assert mine[index] == float(sums.index(max(sums)) == index % 8), (arm, index, sums)
    effects = {row["metric"]: row for row in run.effects.to_pylist()}
    assert effects.keys() == {"acc", "acc_norm", "exact_match"}
    for metric, row in effects.items():
        kind = "toy_words" if metric == "exact_match" else "toy_choice"
        assert (row["arm"], row["kind"], row["n"]) == ("steered", kind, 16)
        assert row["test"] == "mcnemar"
        pairs = [
            (values["base", metric, f"{kind}/{i}"], values["steered", metric, f"{kind}/{i}"])
            for i in range(16)
        ]
        assert row["delta"] == pytest.approx(sum(b - a for a, b in pairs) / 16)
        assert row["ci_low"] <= row["delta"] <= row["ci_high"]
    write_tasks(run, tmp_path / "tasks.json")
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert written["effects"] == run.effects.to_pylist()
    assert written["results"]["base"]["toy_choice"]["acc,none"] == pytest.approx(
        settings["results"]["base"]["toy_choice"]["acc,none"]
    )
    with capsys.disabled():
        print(f"\n288 answers through lm_eval in {took:.1f} s")
        for row in effects.values():
            change = f"{row['base']:.2f} -> {row['value']:.2f}"
            interval = f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
            print(f"  {row['metric']:12} {change}  {interval}  p {row['p_value']:.3f}")


def test_the_mask_is_in_the_numbers(server, tasks):
    """A mask that routes everything elsewhere changes choices; without it nothing changes."""
    one = run_tasks(["toy_choice"], server.url, include_path=tasks)
    again = run_tasks(["toy_choice"], server.url, mask="calm", include_path=tasks)
    assert one.effects.num_rows == 0
    base = again.outcomes.filter(again.outcomes["arm"].to_numpy() == "base")
    assert base["value"].to_pylist() == one.outcomes["value"].to_pylist()
    steered = again.outcomes.filter(again.outcomes["arm"].to_numpy() == "steered")
    assert steered["value"].to_pylist() != base["value"].to_pylist()


def test_a_global_mask_does_not_leak_into_the_base(server, tasks):
    bare = run_tasks(["toy_choice"], server.url, include_path=tasks, limit=8)
    server.put("storm", 6, 7, 8, 9)
    assert server.admin.put("/v1/steering", json={"mask": "storm"}).status_code == 200
    try:
        under = run_tasks(["toy_choice"], server.url, include_path=tasks, limit=8)
        assert under.outcomes == bare.outcomes
        with pytest.raises(InputError, match=r"under storm@1\+calm@1.*global mask"):
            run_tasks(["toy_choice"], server.url, mask="calm", include_path=tasks, limit=8)
    finally:
        server.admin.delete("/v1/steering")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mask": "unknown"}, "HTTP 404.*unknown"),
        ({"mask": "calm@7"}, "HTTP 404"),
        ({"tasks": ["toy_choise"]}, "no task 'toy_choise'; it has toy_choice"),
        ({"model": "other"}, "serves no model 'other'; it serves specimen"),
        ({"tokenizer": "/nowhere"}, "tokenizer /nowhere.*--tokenizer"),
        ({"tasks": []}, "--tasks"),
        ({"url": "http://127.0.0.1:9"}, "nothing answers"),
    ],
)
def test_what_can_t_be_run(server, tasks, options, why):
    with pytest.raises(InputError, match=why):
        run_tasks(**{"tasks": ["toy_choice"], "url": server.url, "include_path": tasks} | options)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'moescope\[eval\]'"):
        run_tasks(["arc_easy"], "http://127.0.0.1:9")


class Proxy:
    """Passes everything on to the server, and from the `after`th completion on without the mask."""

    def __init__(self, target, after):
        self.completions = 0
        client = httpx.AsyncClient(base_url=target, timeout=60)
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        async def forward(path: str, request: Request):
            dropped = {"host", "content-length"}
            if path == "v1/completions":
                self.completions += 1
                if self.completions > after:
                    dropped.add("x-steering-mask")
            headers = {n: v for n, v in request.headers.items() if n not in dropped}
            answer = await client.request(
                request.method, f"/{path}", content=await request.body(), headers=headers
            )
            kept = {
                n: v for n, v in answer.headers.items() if n in ("content-type", "x-steering-mask")
            }
            return Response(answer.content, answer.status_code, kept)

        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(30)


def test_a_lost_header_fails_the_run(server, tasks):
    """Two answers ask which mask is in force; 32 are the base's; then the mask gets lost midway."""
    server.put("calm", 1, 2, 3, 4, 5)
    options = {"mask": "calm", "include_path": tasks, "limit": 4}
    with Proxy(server.url, after=10_000) as proxy:
        run = run_tasks(["toy_choice"], proxy.url, **options)
        assert run.settings["confirmed_answers"] == {"base": 32, "steered": 32}
        assert proxy.completions == 66
    with (
        Proxy(server.url, after=50) as proxy,
        pytest.raises(InputError, match="under the mask none, not calm@1"),
    ):
        run_tasks(["toy_choice"], proxy.url, **options)


def test_a_model_as_judge(server):
    """vLLM's server is an endpoint like any other; a random model has no verdict to give."""
    judge = EndpointJudge(server.url, "specimen", attempts=2)
    with pytest.raises(InputError, match=r"specimen at .*/v1 said .*one word.*--judge-model"):
        judge.refuses(["Open the box."], ["No."])
    with pytest.raises(InputError, match="HTTP 404"):
        EndpointJudge(server.url, "other", attempts=2).refuses(["p"], ["a"])
