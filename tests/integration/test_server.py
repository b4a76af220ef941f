"""`moescope serve` as people start it: a real vLLM server on the CPU, and the openai client."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from servers import PROMPT, Server

from moescope.clients.generate import generate
from moescope.server.audit import replay
from moescope.server.registry import Registry
from moescope.tracer.errors import InputError

pytestmark = pytest.mark.engine

ADMIN, INFERENCE = "admin-key-of-the-test", "inference-key"
SLOTS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(specimen, folder):
    server = Server(folder, specimen("qwen3_moe"), key=ADMIN, api_key=INFERENCE)
    try:
        server.wait()
        for name, experts in {"calm": (1, 2, 3), "storm": (4, 5), "third": (6,)}.items():
            assert server.put(name, *experts).status_code == 200
        yield server
    finally:
        server.stop()


def test_masks_come_change_and_go(server):
    assert server.put("brief", 1).json()["key"] == "brief@1"
    assert server.put("brief", 1).json() | {"created": False} == server.put("brief", 1).json()
    assert server.put("brief", 2).json()["key"] == "brief@2"
    shown = server.admin.get("/v1/masks/brief", params={"version": 1}).json()
    assert (shown["version"], shown["versions"]) == (1, [1, 2])
    assert shown["mask"]["entries"][0]["expert"] == 1
    names = {item["name"] for item in server.admin.get("/v1/masks").json()["data"]}
    assert names >= {"brief", "calm", "storm"}
    assert server.admin.delete("/v1/masks/brief").json()["deleted"] == "brief@2"
    assert server.admin.get("/v1/masks/brief").status_code == 404
    with pytest.raises(openai.NotFoundError, match="brief"):
        server.complete("brief")


def test_the_model_is_described(server):
    moe = server.admin.get("/v1/moe").json()
    assert (moe["moe_layers"], moe["num_experts"], moe["top_k"]) == ([0, 1, 2, 3], 16, 4)
    assert moe["architecture"] == "Qwen3MoeForCausalLM"
    assert moe["slots"]["total"] == SLOTS


def test_keys(server):
    url = f"{server.url}/v1/masks"
    assert httpx.get(url).status_code == 401
    as_client = httpx.get(url, headers={"Authorization": f"Bearer {INFERENCE}"})
    assert as_client.status_code == 401
    assert as_client.json()["error"]["type"] == "AuthenticationError"
    put = httpx.put(f"{url}/x", json={}, headers={"Authorization": f"Bearer {INFERENCE}"})
    assert put.status_code == 401
    assert server.admin.get("/v1/masks").status_code == 200
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    # Who may not ask learns nothing of the masks either.
    with pytest.raises(openai.AuthenticationError):
        stranger.completions.create(
            model="specimen", prompt="x", extra_headers={"X-Steering-Mask": "unknown"}
        )
    assert ADMIN not in server.log.read_text()
    assert ADMIN not in (server.masks / "audit.jsonl").read_text()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("endpoint", ["completions", "chat", "responses"])
def test_steered_on_every_endpoint_and_the_trace_proves_it(server, endpoint, streamed):
    client, example = server.openai, f"{endpoint}-{streamed}"
    chat = {"messages": [{"role": "user", "content": "Where is the lamp?"}], "max_tokens": 6}
    resource, fields = {
        "completions": (client.completions, {"prompt": PROMPT, "max_tokens": 6}),
        "chat": (client.chat.completions, chat),
        "responses": (client.responses, {"input": "Where is it?", "max_output_tokens": 6}),
    }[endpoint]
    raw = resource.with_raw_response.create(
        model="specimen",
        temperature=0,
        stream=streamed,
        extra_headers={"X-Steering-Mask": "calm", "X-Trace-Run": "run"},
        extra_body={"vllm_xargs": {"moescope_example_id": example}},
        **fields,
    )
    if streamed:
        assert len(list(raw.parse())) > 2
    assert raw.headers["x-steering-mask"] == "calm@1"
    assert raw.headers["x-trace"] == "on"
    assert raw.headers["x-trace-run"] == "run"
    experts = server.rows([example])[example]
    assert len(experts) > 4
    assert not np.isin(experts, [1, 2, 3]).any()
    assert server.slots_in_use() == {}


def test_the_mask_matters_and_an_unsteered_request_is_unlike(server):
    for example, mask in {
        "bare": None,
        "none": "none",
        "stormy": "storm",
        "pinned": "storm@1",
    }.items():
        headers, _ = server.complete(mask, example)
        key = {"bare": "none", "none": "none"}.get(example, "storm@1")
        assert headers["x-steering-mask"] == key
    rows = server.rows(["bare", "none", "stormy", "pinned"])
    assert np.isin(rows["bare"], [4, 5]).any()
    assert np.array_equal(rows["bare"], rows["none"])
    assert not np.isin(rows["stormy"], [4, 5]).any()
    assert np.array_equal(rows["stormy"], rows["pinned"])


def test_the_body_names_a_mask_as_well(server):
    def ask(xargs, **headers):
        return server.openai.completions.with_raw_response.create(
            model="specimen",
            prompt=PROMPT,
            max_tokens=2,
            extra_body={"vllm_xargs": xargs},
            extra_headers=headers,
        )

    assert ask({"moescope_mask": "calm"}).headers["x-steering-mask"] == "calm@1"
    same = ask({"moescope_mask": "calm@1"}, **{"X-Steering-Mask": "calm"})
    assert same.headers["x-steering-mask"] == "calm@1"
    with pytest.raises(openai.UnprocessableEntityError, match="storm"):
        ask({"moescope_mask": "calm"}, **{"X-Steering-Mask": "storm"})
    # What vLLM refuses itself gives its slot back too.
    with pytest.raises(openai.BadRequestError, match="moescope_spans"):
        ask({"moescope_mask": "calm", "moescope_spans": "[[1"})
    assert server.slots_in_use() == {}


def test_moescope_generate(server):
    ask = {"url": server.url, "max_tokens": 4, "api_key": INFERENCE}
    answer = generate("Where is the lamp?", mask="calm", run="asked", **ask)
    assert (answer.mask, answer.run) == ("calm@1", "asked")
    assert generate("Where is", raw=True, **ask).mask == "none"
    with pytest.raises(InputError, match="no mask nobody"):
        generate("Where is the lamp?", mask="nobody", **ask)


def test_refusals(server):
    signature = {"moe_layers": [0], "num_experts": 16, "top_k": 4}
    assert server.put("other", 1, layers=[0], signature=signature).status_code == 409
    too_many = server.put("many", *range(13), layers=[2])
    assert too_many.status_code == 422
    assert "layer 2" in too_many.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="no mask nobody"):
        server.complete("nobody")
    with pytest.raises(openai.NotFoundError, match="no version 7"):
        server.complete("calm@7")
    with pytest.raises(openai.UnprocessableEntityError):
        server.complete("calm@x")
    headers = {"Authorization": f"Bearer {INFERENCE}", "X-Steering-Mask": "calm"}
    for path in ("/v1/messages", "/invocations", "/v1/chat/completions/batch"):
        answer = httpx.post(server.url + path, json={}, headers=headers)
        assert answer.status_code == 422, path
    for body in (b"{", b"[]", b""):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
        assert answer.status_code == 422


def open_stream(server, mask, **fields):
    headers = {} if mask is None else {"X-Steering-Mask": mask}
    stream = server.openai.completions.create(
        model="specimen",
        prompt=PROMPT,
        max_tokens=fields.pop("max_tokens", 400),
        temperature=0,
        stream=True,
        extra_headers=headers,
        extra_body={"ignore_eos": True} | fields,
    )
    next(iter(stream))
    return stream


def test_no_free_slot_is_429_and_a_client_that_goes_frees_its(server):
    long = {"max_tokens": 2000}  # they run until they are closed
    with (
        closing(open_stream(server, "calm", **long)),
        closing(open_stream(server, "storm", **long)),
    ):
        assert server.slots_in_use() == {"calm@1": 1, "storm@1": 1}
        assert server.complete("calm")[0]["x-steering-mask"] == "calm@1"
        with pytest.raises(openai.RateLimitError) as error:
            server.complete("third")
        assert error.value.response.headers["retry-after"] == "1"
        assert server.complete()[0]["x-steering-mask"] == "none"
    deadline = time.monotonic() + 10
    while server.slots_in_use():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.complete("third")[0]["x-steering-mask"] == "third@1"


def test_many_masks_through_few_slots_steer_as_asked_or_are_429(server):
    names = [f"one{expert}" for expert in range(8)]
    for expert, name in enumerate(names):
        server.put(name, expert)

    def ask(number):
        try:
            headers, _ = server.complete(names[number % 8], f"many{number}", run="many")
        except openai.RateLimitError:
            return None
        assert headers["x-steering-mask"] == f"{names[number % 8]}@1"
        return number

    with ThreadPoolExecutor(8) as pool:
        done = [number for number in pool.map(ask, range(120)) if number is not None]
    assert len(done) > 8
    rows = server.rows([f"many{number}" for number in done], run="many")
    for number in done:
        assert not (rows[f"many{number}"] == number % 8).any()
    assert server.slots_in_use() == {}


def test_a_mask_that_is_deleted_steers_to_the_end_of_its_requests(server):
    server.put("doomed", 7, 8)
    trace = {"vllm_xargs": {"moescope_example_id": "doomed", "moescope_run": "run"}}
    stream = open_stream(server, "doomed", **trace)
    assert server.admin.delete("/v1/masks/doomed").status_code == 200
    with pytest.raises(openai.NotFoundError):
        server.complete("doomed")
    assert len(list(stream)) > 300
    experts = server.rows(["doomed"])["doomed"]
    assert len(experts) == len(PROMPT) + 400 - 1
    assert not np.isin(experts, [7, 8]).any()


def test_the_global_mask_reaches_running_requests(server):
    server.complete("none", "unsteered", max_tokens=60)
    trace = {"vllm_xargs": {"moescope_example_id": "running", "moescope_run": "run"}}
    events = iter(open_stream(server, None, max_tokens=1000, **trace))
    for _ in range(10):
        next(events)
    assert server.admin.put("/v1/steering", json={"mask": "storm"}).json() == {"mask": "storm@1"}
    for _ in events:
        pass
    assert server.complete()[0]["x-steering-mask"] == "storm@1"
    assert server.complete("none", "not-even-that")[0]["x-steering-mask"] == "none"
    server.complete(None, "under-storm")
    server.complete("calm", "under-calm")
    rows = server.rows(["running", "unsteered", "not-even-that", "under-storm", "under-calm"])
    steered = np.array([mask == "storm@1" for mask in server.masks_of("running")])
    assert len(steered) == len(PROMPT) + 1000 - 1
    # One change, while it ran, from the token on of which the trace says so.
    assert not steered[:10].any()
    assert np.count_nonzero(np.diff(steered.astype(int))) == 1
    assert steered[-1]
    assert not np.isin(rows["running"][steered], [4, 5]).any()
    assert np.isin(rows["running"][~steered], [4, 5]).any()
    assert not np.isin(rows["under-storm"], [4, 5]).any()
    assert not np.isin(rows["under-calm"], [1, 2, 3]).any()
    size = len(rows["not-even-that"])
    assert np.array_equal(rows["not-even-that"], rows["unsteered"][:size])
    assert server.admin.delete("/v1/masks/storm").status_code == 409
    assert server.admin.delete("/v1/steering").json() == {"mask": None}
    assert server.complete()[0]["x-steering-mask"] == "none"


def test_a_started_run_takes_requests_that_say_nothing(server):
    assert server.complete()[0]["x-trace"] == "off"
    assert server.admin.post("/v1/traces/monday/start").json()["started"] is True
    headers, _ = server.complete()
    assert (headers["x-trace"], headers["x-trace-run"]) == ("on", "monday")
    off = server.openai.completions.with_raw_response.create(
        model="specimen", prompt=PROMPT, max_tokens=2, extra_headers={"X-Trace": "off"}
    )
    assert off.headers["x-trace"] == "off"
    assert server.admin.post("/v1/traces/monday/stop").json()["live"] == 0
    assert server.complete()[0]["x-trace"] == "off"
    traces = server.admin.get("/v1/traces").json()
    [monday] = [run for run in traces["runs"] if run["run"] == "monday"]
    assert (monday["requests"], monday["incomplete"]) == (1, 0)
    assert monday["rows"] == len(PROMPT) + 6 - 1
    assert traces["dropped_rows"] == 0
    assert server.admin.post("/v1/traces/..%2fup/start").status_code in (404, 422)


@pytest.fixture(scope="module")
def restarted(server, specimen, folder):
    """The same folders under a new process, this time without keys."""
    server.admin.put("/v1/steering", json={"mask": "calm"})
    server.put("storm", 9)
    with ThreadPoolExecutor(4) as pool:  # in the middle of traffic
        for _ in range(4):
            pool.submit(lambda: open_stream(server, "storm@1"))
        time.sleep(0.3)
        server.process.kill()
        server.process.wait()
    again = Server(folder, specimen("qwen3_moe"), name="2")
    try:
        yield again.wait()
    finally:
        again.stop()


def test_a_restart_keeps_the_masks_and_what_is_in_force(restarted):
    masks = {item["key"] for item in restarted.admin.get("/v1/masks").json()["data"]}
    assert masks >= {"calm@1", "storm@2", "third@1"}
    assert restarted.admin.get("/v1/masks/storm").json()["versions"] == [1, 2]
    assert restarted.admin.get("/v1/steering").json() == {"mask": "calm@1"}
    assert restarted.complete()[0]["x-steering-mask"] == "calm@1"
    restarted.complete(None, "after-restart")
    assert not np.isin(restarted.rows(["after-restart"])["after-restart"], [1, 2, 3]).any()
    assert restarted.complete("storm@1")[0]["x-steering-mask"] == "storm@1"
    assert restarted.admin.get("/v1/masks/brief").status_code == 404
    assert restarted.put("brief", 1).json()["key"] == "brief@3"


def test_without_a_key_other_origins_are_kept_out(restarted):
    answer = restarted.admin.post("/v1/traces/x/start", headers={"Origin": "https://example.com"})
    assert answer.status_code == 401
    assert restarted.admin.get("/v1/masks", headers={"Host": "example.com"}).status_code == 401


def test_nothing_that_the_openapi_page_allows_breaks_the_control_plane(restarted):
    schema = schemathesis.openapi.from_url(f"{restarted.url}/openapi.json")
    schema = schema.include(path_regex="^/v1/(masks|steering|moe|traces)")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 11
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            response = case.call(timeout=60)  # a busy machine may be late
            assert response.status_code < 500, (case, response.text)

        check()
    assert restarted.process.poll() is None


def test_the_log_replays_to_the_state(restarted):
    restarted.stop()
    lines = [json.loads(line) for line in (restarted.masks / "audit.jsonl").open()]
    registry = Registry(restarted.masks)
    assert replay(lines) == registry.state
    registry.close()
    assert {line["what"] for line in lines} >= {"put", "delete", "steering"}
    who = {line["who"] for line in lines}
    assert "loopback" in who
    assert any(name.startswith("key:") for name in who)


@pytest.fixture(scope="module")
def composing(specimen, tmp_path_factory):
    """A server of two tensor-parallel workers; a request's own mask adds to the global one."""
    folder, model = tmp_path_factory.mktemp("both"), specimen("qwen3_moe")
    server = Server(folder, model, "--tensor-parallel-size", "2", own_mask="compose")
    try:
        server.wait()
        masks = {"calm": (1, 2, 3), "storm": (4, 5), "most": range(6, 16)}
        for name, experts in masks.items():
            assert server.put(name, *experts).status_code == 200
        yield server
    finally:
        server.stop()


def steer(server, name):
    return server.admin.put("/v1/steering", json={"mask": name})


def test_an_own_mask_and_the_global_one_are_both_in_force(composing):
    assert composing.admin.get("/v1/moe").json()["own_mask"] == "compose"
    said = {"alone": composing.complete("calm", "alone")[0]["x-steering-mask"]}
    assert steer(composing, "storm").status_code == 200
    for example, mask in {"both": "calm", "global": None, "free": "none"}.items():
        said[example] = composing.complete(mask, example)[0]["x-steering-mask"]
    assert said == {
        "alone": "calm@1",
        "both": "storm@1+calm@1",
        "global": "storm@1",
        "free": "none",
    }
    rows = composing.rows(said)
    assert not np.isin(rows["both"], [1, 2, 3, 4, 5]).any()
    assert np.isin(rows["alone"], [4, 5]).any()
    assert np.isin(rows["global"], [1, 2, 3]).any()
    assert np.isin(rows["free"], [1, 2, 3, 4, 5]).any()
    for example, key in said.items():
        assert set(composing.masks_of(example)) == {key}


def test_a_global_change_reaches_running_requests_with_their_own_mask(composing):
    composing.admin.delete("/v1/steering")
    trace = {"vllm_xargs": {"moescope_example_id": "running", "moescope_run": "run"}}
    events = iter(open_stream(composing, "calm", max_tokens=1000, **trace))
    for _ in range(10):
        next(events)
    refused = steer(composing, "most")  # 13 of 16 experts off, and top-4
    assert refused.status_code == 409
    for words in ("most@1", "calm@1", "layer 0", "13 of its 16"):
        assert words in refused.json()["error"]["message"]
    assert composing.admin.get("/v1/steering").json() == {"mask": None}
    assert steer(composing, "storm").json() == {"mask": "storm@1"}
    for _ in events:
        pass
    experts = composing.rows(["running"])["running"]
    masks = composing.masks_of("running")
    both = np.array([mask == "storm@1+calm@1" for mask in masks])
    assert set(masks) == {"calm@1", "storm@1+calm@1"}
    assert np.count_nonzero(np.diff(both.astype(int))) == 1
    assert both[-1]
    assert not np.isin(experts, [1, 2, 3]).any()
    assert not np.isin(experts[both], [4, 5]).any()
    assert np.isin(experts[~both], [4, 5]).any()


def test_a_mask_that_cannot_join_the_global_one_is_refused_and_an_idle_one_bars_nothing(composing):
    composing.admin.delete("/v1/steering")
    composing.complete("calm")
    assert composing.admin.get("/v1/moe").json()["slots"]["loaded"] == ["calm@1"]
    assert steer(composing, "most").json() == {"mask": "most@1"}
    assert composing.admin.get("/v1/moe").json()["slots"]["loaded"] == []
    with pytest.raises(openai.UnprocessableEntityError, match=r"most@1 and mask calm@1 together"):
        composing.complete("calm")
    assert composing.complete("storm")[0]["x-steering-mask"] == "most@1+storm@1"
    composing.admin.delete("/v1/steering")
    assert composing.complete("calm")[0]["x-steering-mask"] == "calm@1"
    assert composing.slots_in_use() == {}


def test_a_server_for_others_needs_a_key(specimen, tmp_path):
    server = Server(tmp_path, specimen("qwen3_moe"), host="0.0.0.0")
    assert server.process.wait(timeout=120) == 2
    assert "admin key" in server.log.read_text()
    assert not server.listens()


def test_a_model_without_experts_is_refused_before_anything_listens(specimen, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model = tmp_path / "dense"
    tokenizer = AutoTokenizer.from_pretrained(specimen("qwen3_moe"))
    tokenizer.save_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    server = Server(tmp_path, model, "--max-model-len", "512")
    heard = False
    while server.process.poll() is None:
        heard = heard or server.listens()
        time.sleep(0.05)
    assert server.process.returncode == 2
    assert "no mixture-of-experts layers" in server.log.read_text()
    assert not heard
