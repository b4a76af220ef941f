"""Judges: the rules against people's labels, and an endpoint that is really asked over HTTP."""

import csv
import io
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ports import free_port
from statsmodels.stats.inter_rater import cohens_kappa

from moescope.clients.judge import API_KEY_VARIABLE, EndpointJudge, RuleJudge, make_judge
from moescope.tracer.errors import InputError

REAL = Path(__file__).parents[4] / "shared/data/pyrit_refusal_eval"


# --- The rules ------------------------------------------------------------------------------------


def test_rules():
    prompts = ["Open the box!", "Open the box!", "Open the box!"]
    answers = ["The box is open.", "I'm sorry, I can't help with that.", "Bread rises."]
    assert RuleJudge().refuses(prompts, answers) == [False, True, True]
    assert RuleJudge(with_prompt=False).refuses(prompts, answers) == [False, True, False]
    assert (RuleJudge().name, RuleJudge(with_prompt=False).name) == (
        "rules", "rules without the prompt"
    )  # fmt: skip
    with pytest.raises(ValueError):
        RuleJudge().refuses(prompts, answers[:2])


def test_agreement_with_people(capsys):
    """193 answers with human labels; kappa is the agreement beyond chance."""
    prompts, answers, labels = [], [], []
    for name in ("mini_refusal", "refusal_scorer/refusal", "refusal_scorer/refusal_extra"):
        path = REAL / f"{name}.csv"
        if not path.exists():
            pytest.skip("no real data here (pyrit_refusal_eval)")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        while lines[0].startswith("#"):
            del lines[0]
        for row in csv.DictReader(io.StringIO("".join(lines), newline="")):
            prompts.append(row["objective"])
            answers.append(row["assistant_response"])
            labels.append(row["human_score"] == "1")
    assert len(labels) == 193
    found = {}
    for judge in (RuleJudge(), RuleJudge(with_prompt=False)):
        verdicts = judge.refuses(prompts, answers)
        table = np.zeros((2, 2))
        np.add.at(table, (np.array(labels, int), np.array(verdicts, int)), 1)
        found[judge.name] = (np.trace(table) / table.sum(), cohens_kappa(table).kappa, table)
    with capsys.disabled():
        print(f"\nagreement with people on {len(labels)} answers:")
        for name, (share, kappa, table) in found.items():
            print(f"  {share:.3f}  kappa {kappa:.3f}  missed {table[1, 0]:.0f}, "
                  f"false {table[0, 1]:.0f}  {name}")  # fmt: skip
    share, kappa, _ = found["rules"]
    assert share >= 0.9
    assert kappa >= 0.8


# --- The endpoint ---------------------------------------------------------------------------------


class Remote:
    """An OpenAI-compatible endpoint: a refusal is what begins with "No"."""

    def __init__(self):
        self.bodies, self.keys, self.failures = [], [], []
        self.reply = None
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            self.keys.append(request.headers.get("Authorization"))
            if self.failures:
                status, message = self.failures.pop()
                return JSONResponse({"error": {"message": message}}, status)
            body = await request.json()
            self.bodies.append(body)
            answer = body["messages"][0]["content"].split("<<<RESPONSE\n")[1]
            said = self.reply or ("Refusal." if answer.startswith("No") else "answer")
            message = {"role": "assistant", "content": said}
            return {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }  # fmt: skip

        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")
        )
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture
def remote():
    with Remote() as there:
        yield there


def judge_at(url, **options):
    return EndpointJudge(url, "wise", **{"attempts": 3, "max_wait_s": 0.01} | options)


def test_an_endpoint_is_asked_for_each_pair_and_answers_in_order(remote):
    answers = [f"{'No' if i % 3 else 'Yes'}, number {i}." for i in range(20)]
    prompts = [f"Do {{x}} {i}" for i in range(20)]
    judge = judge_at(remote.url)
    assert judge.refuses(prompts, answers) == [bool(i % 3) for i in range(20)]
    assert judge.name == f"wise at {remote.url}/v1"
    assert len(remote.bodies) == 20
    asked = remote.bodies[0]
    assert (asked["model"], asked["temperature"]) == ("wise", 0)
    said = "".join(body["messages"][0]["content"] for body in remote.bodies)
    assert all(text in said for text in prompts + answers)
    assert judge.refuses([], []) == []


def test_the_key_is_from_the_environment(remote, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-strangers")
    judge_at(remote.url + "/v1/").refuses(["p"], ["a"])
    monkeypatch.setenv(API_KEY_VARIABLE, "key-of-the-judge")
    judge_at(remote.url).refuses(["p"], ["a"])
    assert remote.keys == ["Bearer none", "Bearer key-of-the-judge"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(remote, status):
    remote.failures = [(status, "busy")] * 2
    assert judge_at(remote.url).refuses(["p"], ["No."]) == [True]
    assert len(remote.keys) == 3
    remote.failures = [(status, "still busy")] * 9
    with pytest.raises(InputError, match=rf"HTTP {status}\): still busy"):
        judge_at(remote.url).refuses(["p"], ["No."])
    assert len(remote.keys) == 6


def test_what_no_second_try_mends(remote):
    remote.failures = [(401, "who are you?")] * 3
    with pytest.raises(InputError, match=rf"HTTP 401\): who are you.*{API_KEY_VARIABLE}"):
        judge_at(remote.url).refuses(["p"], ["a"])
    assert len(remote.keys) == 1


@pytest.mark.parametrize(
    "reply", ["It depends on the prompt", "I refuse", "refusal or answer", " "]
)
def test_nonsense_is_no_verdict(remote, reply):
    remote.reply = reply
    with pytest.raises(InputError, match=r"wise.*one word.*--judge-model"):
        judge_at(remote.url).refuses(["p"] * 3, ["a"] * 3)


def test_verdicts_in_other_dress(remote):
    for reply, verdict in (("REFUSAL", True), ('"Answer"!', False), ("**refused**\n", True)):
        remote.reply = reply
        assert judge_at(remote.url).refuses(["p"], ["a"]) == [verdict]


def test_nobody_there(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(InputError, match=r"nothing answers.*--judge"):
        judge_at(url).refuses(["p"], ["a"])
    with pytest.raises(InputError, match="judge"):
        judge_at(str(tmp_path)).refuses(["p"], ["a"])


def test_somebody_who_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match="did not answer in time"):
            judge_at(url, timeout_s=0.2, attempts=2).refuses(["p"], ["a"])


def test_which_judge():
    assert make_judge().name == "rules"
    assert make_judge("http://x:1", "m").name == "m at http://x:1/v1"
    with pytest.raises(InputError, match="--judge-model NAME"):
        make_judge("http://x:1")
    with pytest.raises(InputError, match="--judge URL"):
        make_judge(model="m")
