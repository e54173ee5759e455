"""Shards in an S3-compatible store, which now and then fails."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from data_tiny import write_latents
from test_data_loader import SHAPES, cached, same

from soratrain.data.remote import Remote, RemoteFolder
from soratrain.errors import DataError, StoreError

pytest.importorskip("s3fs", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto")
QUICK = Remote(retries=3, timeout=2, backoff=0.01)


class Faulty:
    """A WSGI application before the store: does one fault a GET of a shard, in order, then lets through."""

    def __init__(self, store: Any) -> None:
        self.store, self.faults, self.always, self.asked = store, [], None, 0

    def __call__(self, environ: dict, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] != "GET" or not environ["PATH_INFO"].endswith(".tar"):
            return self.store(environ, start_response)
        self.asked += 1
        fault = self.faults.pop(0) if self.faults else self.always
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.store(environ, start_response))
        return [body[: len(body) // 2]] if fault == "short" else [body]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object, **__: object) -> None: ...

    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        yield faulty
    server.shutdown()


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory) -> Path:
    import boto3

    folder = write_latents(tmp_path_factory.mktemp("latents"), SHAPES)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="bucket", Key=f"data/{path.relative_to(folder)}", Body=path.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def whole(store):
    store.faults, store.always, store.asked = [], None, 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_failing_s3_store_equal_those_from_disk(store, folder, workers):
    local = list(cached(str(folder)).loader(0, 5))
    store.faults = [503, "short", 500]
    far = list(cached("s3://bucket/data", workers=workers, remote=QUICK).loader(0, 5))
    assert len(far) == 5 and all(same(a, b) for a, b in zip(local, far, strict=True))
    assert not store.faults


def test_each_failure_costs_one_request(store, folder):
    store.faults = [503, "short"]
    data = (folder / "shard-000000.tar").read_bytes()
    assert RemoteFolder("s3://bucket/data", QUICK).read("shard-000000.tar", 100, 900) == data[100:1000]
    assert store.asked == 3  # no other layer tries again by itself


def test_a_dead_s3_store_and_a_forbidden_one_stop_the_run(store, folder):
    data = RemoteFolder("s3://bucket/data", QUICK)
    store.always = 503
    with pytest.raises(StoreError, match="status 503, 4 times"):
        data.read("shard-000000.tar", 0, 10)
    store.always, store.asked = 403, 0
    with pytest.raises(StoreError, match="check the credentials"):
        data.read("shard-000000.tar", 0, 10)
    assert store.asked == 1


def test_what_is_not_in_s3_is_damage(store, folder):
    data = RemoteFolder("s3://bucket/data", QUICK)
    with pytest.raises(DataError, match="no such file"):
        data.read("other.tar", 0, 10)
    with pytest.raises(DataError, match="ends before"):
        data.read("shard-000000.tar", 1 << 30, 10)
