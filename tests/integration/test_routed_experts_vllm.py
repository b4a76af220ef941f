"""Responses as vLLM's own classes write them are imported whole."""

import json

import numpy as np
import pytest

from moescope.analysis import open_store
from moescope.analysis.routed_experts import import_routed_experts
from moescope.analysis.routed_sources import Layout


def experts(tokens):
    """[tokens, 3 layers, top-2 of 8], the first layer dense: zeros, as vLLM returns it."""
    ids = np.random.default_rng(0).random((tokens, 3, 8)).argsort(axis=2)[..., :2]
    ids[:, 0] = 0
    return ids.astype(np.uint8)


def completion(ids):
    from vllm.entrypoints.openai.completion import protocol

    return protocol.CompletionResponse(
        model="m",
        choices=[protocol.CompletionResponseChoice(index=0, text="x", **ids)],
        usage=protocol.UsageInfo(prompt_tokens=4, completion_tokens=3, total_tokens=7),
    )


def chat(ids):
    from vllm.entrypoints.openai.chat_completion import protocol

    prompt = ids.pop("prompt_token_ids")
    message = protocol.ChatMessage(role="assistant", content="x")
    return protocol.ChatCompletionResponse(
        model="m",
        choices=[protocol.ChatCompletionResponseChoice(index=0, message=message, **ids)],
        usage=protocol.UsageInfo(prompt_tokens=4, completion_tokens=3, total_tokens=7),
        prompt_token_ids=prompt,
    )


@pytest.mark.parametrize("make", [completion, chat])
def test_a_response(tmp_path, make):
    from vllm.utils.serial_utils import numpy2base64

    ids = {
        "prompt_token_ids": [1, 2, 3, 4],
        "token_ids": [7, 8, 9],
        "routed_experts": numpy2base64(experts(6)),
    }
    response = make(ids)
    (tmp_path / "r.json").write_text(json.dumps(response.model_dump(mode="json")))
    counts = import_routed_experts([tmp_path / "r.json"], tmp_path / "s", Layout(8))
    assert counts == (1, 6)
    con = open_store(tmp_path / "s")
    rows = con.execute(
        "SELECT request_id, token_id, segment, expert_ids FROM tokens ORDER BY position"
    ).fetchall()
    assert rows == [
        (response.id, token, segment, ids.ravel().tolist())
        for token, segment, ids in zip(
            [1, 2, 3, 4, 7, 8], ["prompt"] * 4 + ["response"] * 2, experts(6)[:, 1:], strict=True
        )
    ]
