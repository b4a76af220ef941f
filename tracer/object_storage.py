"""Object storage as pyarrow speaks to it: which endpoint, which credentials, what an error means.

pyarrow finds credentials by itself; of the standard variables it leaves the endpoint, the region's
second name and the certificates to us. docs/object-stores.md lists them all.

`url` is SCHEME://BUCKET/… in all of this.
"""

import functools
import os
import re
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from moescope.tracer.errors import InputError, StoreError

_STALLED_S = 10  # without a byte; pyarrow's own 3 s are short for a busy server
_CONNECT_S = 5
_GCS_RETRY = timedelta(seconds=5)  # its own limit is 15 minutes

# What trying again doesn't change, in the words of pyarrow's errors.
_REFUSALS = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE",
    "INVALID_CLIENT_TOKEN_ID", "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN",
    "EXPIRED_TOKEN", "ExpiredToken", "InvalidToken", "PERMISSION_DENIED", "UNAUTHENTICATED",
    "Could not create a OAuth2 access token",
)  # fmt: skip
_NO_BUCKET = ("NO_SUCH_BUCKET", "The specified bucket does not exist", "bucket not found")


def filesystem(url: str) -> Any:
    """The `pyarrow.fs.FileSystem` of a bucket; StoreError if nothing answers where it should be."""
    if url.startswith("gs:"):
        return _gcs(os.environ.get("STORAGE_EMULATOR_HOST") or None)
    return _s3(bucket_of(url), *_s3_environment())


def bucket_of(url: str) -> str:
    """The bucket of a URL."""
    return url.partition("://")[2].partition("/")[0]


def is_refusal(error: OSError) -> bool:
    """Whether an error of pyarrow will be the same when tried again."""
    return isinstance(error, FileNotFoundError) or any(
        word in str(error) for word in (*_REFUSALS, *_NO_BUCKET)
    )


def is_remote(error: BaseException) -> bool:
    """Whether an error comes from object storage, and not from what is in a file."""
    return "AWS Error" in str(error) or "google::cloud" in str(error)


def explained(error: OSError, url: str) -> StoreError:
    """What pyarrow's error says of a place, and what to do."""
    said = _shortened(str(error))
    # Google's answer to an upload is that nothing is there.
    if any(word in said for word in _NO_BUCKET) or isinstance(error, FileNotFoundError):
        return StoreError(no_bucket(url))
    if any(word in said for word in _REFUSALS):
        need = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), AWS_REGION"
            if url.startswith("s3:")
            else "GOOGLE_APPLICATION_CREDENTIALS (or `gcloud auth application-default login`)"
        )
        return StoreError(
            f"{_endpoint(url)} refuses access to {url}: check {need}, and what they may do in "
            f"the bucket {bucket_of(url)!r} ({said})."
        )
    if "NETWORK_CONNECTION" in said or "UNAVAILABLE" in said:
        return StoreError(f"can't reach {_endpoint(url)} for {url}: {said}.")
    return StoreError(f"{url}: {said}.")


def no_bucket(url: str) -> str:
    """The message where a bucket is missing."""
    return (
        f"there is no bucket {bucket_of(url)!r} at {_endpoint(url)}: create it, or name another in "
        f"{url.partition(':')[0]}://BUCKET/PATH."
    )


def _shortened(said: str) -> str:
    """An error of Google's library without what it says twice."""
    said = said.partition(" error_info=")[0]
    return re.sub(r"^.*with a last message of |Learn more about.*?(?=The underlying)", "", said)


def _endpoint(url: str) -> str:
    """Whom we ask, for messages."""
    if url.startswith("gs:"):
        return os.environ.get("STORAGE_EMULATOR_HOST") or "Google Cloud Storage"
    endpoint, region, _ = _s3_environment()
    return endpoint or f"Amazon S3{f' in {region}' if region else ''}"


def _s3_environment() -> tuple[str | None, str | None, str | None]:
    """(endpoint, region, file of certificates), by the variables that pyarrow leaves to us."""
    get = os.environ.get
    return (
        get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL") or None,
        get("AWS_REGION") or get("AWS_DEFAULT_REGION") or None,
        get("AWS_CA_BUNDLE") or None,
    )


@functools.lru_cache
def _s3(bucket: str, endpoint: str | None, region: str | None, certificates: str | None) -> Any:
    from pyarrow import fs

    options: dict[str, Any] = {}
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/"):
            raise InputError(f"AWS_ENDPOINT_URL={endpoint!r}: write http(s)://HOST or HOST:PORT.")
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        region = region or "us-east-1"  # such servers have one, mostly by this name
    elif region is None:
        try:
            region = fs.resolve_s3_region(bucket)
        except FileNotFoundError:
            raise StoreError(no_bucket(f"s3://{bucket}")) from None
        except OSError as error:
            raise explained(error, f"s3://{bucket}") from error
    if certificates is not None:
        options["tls_ca_file_path"] = certificates
    return fs.S3FileSystem(
        region=region,
        request_timeout=_STALLED_S,
        connect_timeout=_CONNECT_S,
        # Small objects in one request. Large ones go in parts, which must be sent in the
        # background: otherwise pyarrow completes an upload one of whose parts has failed.
        allow_delayed_open=True,
        background_writes=True,
        **options,
    )


@functools.lru_cache
def _gcs(emulator: str | None) -> Any:
    from pyarrow import fs

    if emulator is None:
        return fs.GcsFileSystem(retry_time_limit=_GCS_RETRY)
    parts = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
    return fs.GcsFileSystem(
        anonymous=True,
        scheme=parts.scheme,
        endpoint_override=parts.netloc,
        retry_time_limit=_GCS_RETRY,
    )
