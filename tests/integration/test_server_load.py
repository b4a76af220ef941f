"""5,000 short requests with 200 masks through 16 slots."""

import asyncio
import random
from collections import Counter

import httpx
import pytest
from servers import PROMPT, Server

from moescope.analysis import open_store

pytestmark = pytest.mark.engine

NUM_REQUESTS, NUM_MASKS, SLOTS, AT_ONCE = 5000, 200, 16, 40


@pytest.fixture(scope="module")
def server(specimen, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("load"), specimen("qwen3_moe"), slots=SLOTS)
    try:
        server.wait()
        for number in range(NUM_MASKS):
            # Every mask another pair of experts, so that one can't be taken for another.
            answer = server.put(f"m{number}", number % 16, (number + 1 + number // 16) % 16)
            assert answer.status_code == 200, answer.text
        yield server
    finally:
        server.stop()


def test_all_are_steered_as_asked_or_answered_429(server):
    draw = random.Random(0)
    asked = [draw.randrange(NUM_MASKS) for _ in range(NUM_REQUESTS)]
    answers = asyncio.run(_send_all(server.url, asked))
    statuses = Counter(status for status, _ in answers)
    assert statuses.keys() <= {200, 429}
    assert statuses[200] > NUM_REQUESTS / 10
    assert statuses[429] > 0  # 40 at once do want more than 16 masks at times
    steered = [i for i, (status, _) in enumerate(answers) if status == 200]
    for i, (status, headers) in enumerate(answers):
        if status == 200:
            assert headers["x-steering-mask"] == f"m{asked[i]}@1"
        else:
            assert int(headers["retry-after"]) >= 1
    assert server.slots_in_use() == {}
    server.rows([str(i) for i in steered])
    rows = (
        open_store(server.store)
        .execute(
            "SELECT example_id, routing.mask, list(DISTINCT expert) FROM routing "
            "JOIN requests USING (request_id) GROUP BY ALL"
        )
        .fetchall()
    )
    assert len(rows) == len(steered)
    for example, mask, experts in rows:
        number = asked[int(example)]
        assert mask == f"m{number}@1"
        assert {number % 16, (number + 1 + number // 16) % 16}.isdisjoint(experts)
    print(f"{statuses[200]} steered, {statuses[429]} answered 429")


async def _send_all(url, asked):
    gate = asyncio.Semaphore(AT_ONCE)

    async def send(client, i):
        body = {
            "model": "specimen",
            "prompt": PROMPT,
            "max_tokens": 2,
            "vllm_xargs": {"moescope_example_id": f"{i}"},
        }
        headers = {"X-Steering-Mask": f"m{asked[i]}", "X-Trace-Run": "run"}
        async with gate:
            answer = await client.post("/v1/completions", json=body, headers=headers)
        return answer.status_code, answer.headers

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return await asyncio.gather(*(send(client, i) for i in range(len(asked))))
