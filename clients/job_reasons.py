"""Why a line of a job is unusable, in the words of the person who wrote it."""

from pydantic import ValidationError
from pydantic_core import ErrorDetails

MAX_REASONS = 3


def reason(error: ValueError) -> str:
    """What is wrong with one line: an error from decoding, from the format or of our own."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
    if not isinstance(error, ValidationError):
        return str(error)
    details = error.errors(include_url=False, include_input=False)
    reasons = [_explain(detail) for detail in details[:MAX_REASONS]]
    if len(details) > MAX_REASONS:
        reasons.append(f"and {len(details) - MAX_REASONS} more")
    return "; ".join(reasons)


def _explain(detail: ErrorDetails) -> str:
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in detail["loc"]).lstrip(".")
    match detail["type"]:
        case "json_invalid":
            reason = str(detail["ctx"]["error"]).replace(" at line 1 column", " at column")
            return f"not JSON: {reason}"
        case "missing":
            return f"`{where}` is missing"
        case "unexpected_keyword_argument":
            return f"`{where}` is no field of the format"
        case "string_pattern_mismatch":
            return f"`{where}` is blank"
        case "dataclass_type":
            return f"`{where}` must be a JSON object" if where else "not a JSON object"
        case "tuple_type":
            return f"`{where}` must be a list"
        case "value_error":
            reason = str(detail["ctx"]["error"])
        case _:
            reason = detail["msg"][0].lower() + detail["msg"][1:]
    return f"`{where}`: {reason}" if where else reason
