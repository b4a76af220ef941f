import json

import pytest

from moescope.server.errors import AuthError, ConflictError, UnknownError, refusal
from moescope.tracer.errors import InputError, SlotsFullError, StoreError
from moescope.tracer.mask import SignatureError


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (AuthError, 401),
        (UnknownError, 404),
        (SignatureError, 409),
        (ConflictError, 409),
        (InputError, 422),
        (SlotsFullError, 429),
        (StoreError, 503),
    ],
)
def test_every_error_has_its_status_and_vllms_format(kind, code):
    answer = refusal(kind("why"))
    error = json.loads(answer.body)["error"]
    assert (answer.status_code, error["code"], error["message"]) == (code, code, "why")
    assert error.keys() == {"message", "type", "param", "code"}


def test_half_a_character_does_not_break_the_answer():
    assert json.loads(refusal(InputError("no \ud800")).body)["error"]["message"] == "no ?"
