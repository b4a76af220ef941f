from pathlib import Path

import pytest

from moescope.tracer.errors import InputError
from moescope.tracer.object_path import ObjectPath, ObjectStat, store_path


@pytest.mark.parametrize(
    ("text", "scheme", "key"),
    [
        ("s3://bucket/traces", "s3", "bucket/traces"),
        ("s3://bucket", "s3", "bucket"),
        ("s3://bucket/a//b/", "s3", "bucket/a/b"),
        ("gs://my-bucket.example/run=1/x y", "gs", "my-bucket.example/run=1/x y"),
    ],
)
def test_a_url_is_a_place_in_object_storage(text, scheme, key):
    place = store_path(text)
    assert place == ObjectPath(scheme, key)
    assert store_path(str(place)) == place
    # What pathlib makes of it is understood, since it is easily done.
    assert store_path(Path(text)) == place
    assert place.absolute() == place


@pytest.mark.parametrize("text", ["traces", "/srv/s3/traces", "../s3", "s3", "a:b/c"])
def test_everything_else_is_a_path(text):
    assert store_path(text) == store_path(Path(text)) == Path(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3://./traces", "names no bucket"),
        ("s3://Bucket/x", "names no bucket"),
        ("s3://key:secret@bucket/x", "environment"),
        ("s3://localhost:9000/x", "environment"),
        ("hdfs://host/x", "no place for a store"),
        ("https://bucket.s3.amazonaws.com/x", "no place for a store"),
        ("file:///srv/traces", "without file://"),
    ],
)
def test_another_url_is_refused_with_what_to_write(text, message):
    with pytest.raises(InputError, match=message) as caught:
        store_path(text)
    assert "secret" not in str(caught.value)


def test_it_is_taken_apart_as_paths_are():
    root = store_path("s3://bucket/traces")
    file = root / "tokens" / "w.1-000001.parquet"
    assert str(file) == "s3://bucket/traces/tokens/w.1-000001.parquet"
    assert (file.bucket, file.name, file.stem) == ("bucket", "w.1-000001.parquet", "w.1-000001")
    assert file.parent == root / "tokens"
    assert file.relative_to(root) == "tokens/w.1-000001.parquet"
    with pytest.raises(ValueError, match="is not in"):
        file.relative_to(store_path("s3://bucket/trace"))
    # What a listing knew of it takes no part in comparing.
    assert ObjectPath("s3", file.key, ObjectStat(5, 1.0)) == file
    assert store_path("s3://bucket").parent == store_path("s3://bucket")
