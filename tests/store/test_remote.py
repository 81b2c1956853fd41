"""Stores behind a URL: an object store that speaks S3 (moto's server, in a thread), and fsspec's memory.

Credentials and endpoint come as fsspec and botocore take them: from the environment, or as storage options.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from click.testing import CliRunner

from tad.errors import StoreError
from tad.store import open_store
from tad.synth import make_video
from tests.store.makers import SOURCE, place_for, put, rows

DOCS = Path(__file__).parents[2] / "docs" / "cluster.md"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
# of botocore and moto, on versions of Python that they find old, and on clocks without a zone
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:moto.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:werkzeug.*"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an empty S3 server with the bucket ``bucket``."""
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed: pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'tad-pipeline[s3]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    s3fs.S3FileSystem(endpoint_url=address, key="test", secret="test").mkdir("bucket")
    yield address
    running.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store that is not there yet."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    return f"s3://bucket/{uuid4().hex}/features.zarr"


@pytest.fixture(params=["s3", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3") if request.param == "s3" else place_for("memory", tmp_path)


def test_what_is_written_is_read_back(url: str) -> None:
    arrays = {"v": rows(50), "wörld cup/2 (final).mp4": rows(400, 900, seed=1)}  # the second one in several chunks
    with open_store(url, "a") as store:
        for video, array in arrays.items():
            put(store, video, array)
        store.write_catalog()
    with open_store(url) as store:
        assert (store.format, store.streams(), store.videos("s")) == ("zarr", ["s"], sorted(arrays))
        for video, array in arrays.items():
            np.testing.assert_array_equal(store["s", video].numpy(), array)
            np.testing.assert_array_equal(store["s", video][7:30], array[7:30])
            np.testing.assert_array_equal(store.dask("s")[video][3:5].compute(), array[3:5])
        assert store.verify(deep=True).problems == []
        assert list(store.catalog()["rows"]) == list(store.catalog(refresh=False)["rows"]) == [50, 400]
        assert store.is_done("s", "v", SOURCE)
        assert not store.is_done("s", "v", SOURCE | {"size": 1})
        again = pickle.loads(pickle.dumps(store))
        np.testing.assert_array_equal(again["s", "v"][:5], arrays["v"][:5])
    with open_store(url, "a") as store:
        put(store, "v", rows(9), overwrite=True)
        np.testing.assert_array_equal(store["s", "v"].numpy(), rows(9))
        store.delete("s", "v")
        assert store.videos("s") == sorted(arrays)[1:]
        assert store.gc(min_age_s=0) == []


class Breaking:
    """Lets ``puts`` uploads through, then one fails as it does when a server goes away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Any, puts: int) -> None:
        files = store._backend.files
        whole, self.left, self.failed = files.fs.pipe_file, puts, 0

        def pipe_file(path: str, data: bytes, **options: Any) -> None:
            self.left -= 1
            if self.left == -1:
                self.failed += 1
                raise ConnectionResetError("connection reset by peer")
            whole(path, data, **options)

        monkeypatch.setattr(files.fs, "pipe_file", pipe_file)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("puts", [0, 1, 2])
def test_an_upload_that_breaks_off_leaves_nothing_visible(
    url: str, puts: int, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(url, "a") as store:
        put(store, "whole", rows(5))
        if replaced:
            put(store, "v", rows(6, seed=3))
    with open_store(url, "a") as store, monkeypatch.context() as patched:
        breaking = Breaking(patched, store, puts)
        with pytest.raises(StoreError, match=r"cannot be reached: connection reset by peer.*run the same again"):
            put(store, "v", rows(50), overwrite=replaced)
        assert breaking.failed == 1
        # nothing is better than a mixture: an entry that is replaced goes first
        assert store.videos("s") == ["whole"]
        assert not store.has("s", "v")
        assert not store.is_done("s", "v", SOURCE)
        assert store.verify(deep=True).problems == []
        assert list(store.catalog()["video"]) == ["whole"]
    with open_store(url, "a") as store:
        assert store.gc() == []  # a writer may still be at it
        assert store.gc(dry_run=True, min_age_s=0) == (["s/v"] if puts or replaced else [])
        store.gc(min_age_s=0)
        assert store.gc(min_age_s=0) == []
        put(store, "v", rows(50))
        np.testing.assert_array_equal(store["s", "v"].numpy(), rows(50))
        np.testing.assert_array_equal(store["s", "whole"].numpy(), rows(5))


def test_damage_is_found(s3: str) -> None:
    with open_store(s3, "a") as store:
        put(store, "v", rows(50))
        files = store._backend.files
        data = bytearray(files.read("s/v/features/c.0.0") or b"")
        data[10] ^= 1
        files.write("s/v/features/c.0.0", bytes(data))
        assert [problem.video for problem in store.verify(deep=True).problems] == ["v"]
        with pytest.raises(StoreError, match="cannot be read"):
            store["s", "v"].numpy()
        files.delete("s/v/features/c.0.0")
        assert not store.verify().ok


def test_endpoint_by_storage_options_and_by_fsspec(server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(s3, "a") as store:
        put(store, "v", rows(5))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = {"endpoint_url": server, "key": "test", "secret": "test"}
    with open_store(s3, storage_options=options) as store:
        np.testing.assert_array_equal(store["s", "v"].numpy(), rows(5))
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))["s", "v"].numpy(), rows(5))
    # FSSPEC_S3_... is read when fsspec is imported
    code = f"from tad.store import open_store; print(open_store({s3!r})['s', 'v'].shape)"
    environment = {**os.environ, **{f"FSSPEC_S3_{name.upper()}": value for name, value in options.items()}}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(5, 4)", done.stderr


@pytest.mark.parametrize("case", ["bucket", "endpoint", "credentials"])
def test_what_is_not_reached_is_said(s3: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    place, options, words = {
        "bucket": ("s3://nobucket/features.zarr", {}, "nobucket.*does not exist"),
        "endpoint": (s3, {"endpoint_url": "http://127.0.0.1:9"}, "cannot be reached.*127.0.0.1:9.*endpoint"),
        "credentials": (s3, {"profile": "absent"}, "cannot be reached.*absent.*credentials"),
    }[case]
    with pytest.raises(StoreError, match=words):
        open_store(place, "a", storage_options={"config_kwargs": quick, **options})


def test_a_connection_that_is_lost_is_no_damage(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import EndpointConnectionError

    with open_store(s3, "a") as store:
        put(store, "v", rows(5))
    with open_store(s3) as store:
        feature = store["s", "v"]

        def gone(*_: object, **__: object) -> None:
            raise EndpointConnectionError(endpoint_url="http://here")

        monkeypatch.setattr(store._backend.files.fs, "exists", gone)
        with pytest.raises(StoreError, match="cannot be reached"):
            store.is_done("s", "v", SOURCE)  # not False: the video would be extracted again
        with pytest.raises(StoreError, match="cannot be reached"):
            feature.numpy()
        with pytest.raises(StoreError, match="cannot be reached"):
            store.verify()


def test_extraction_into_a_bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/cluster.md shows it, then again after an upload broke off, and against a local store."""
    from tad.cli import main
    from tad.extract import extract
    from tad.recipe import ExtractRecipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for number, seconds in enumerate((1.5, 3.0)):
        make_video(f"videos/v{number}.mp4", duration_s=seconds, seed=number, fps=10.0, size=(48, 64))
    (command,) = re.findall(r"<!-- bucket -->\n```bash\n(.*?)\n```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    export, line = command.splitlines()
    assert export == "export AWS_ENDPOINT_URL=http://localhost:9000"
    for old, new in {
        "s3://bucket/features.zarr": s3,
        "--backbone i3d-rgb --weights rgb_imagenet.pt": "--backbone tiny --weights random:1",
    }.items():
        assert old in line
        line = line.replace(old, new)
    done = CliRunner().invoke(main, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert "2 entries written" in done.output

    recipe = ExtractRecipe(backbone="tiny", weights="random:1")
    assert extract("videos", store=s3, recipes=recipe).already == 2
    extract("videos", store="local.zarr", recipes=recipe)
    with open_store(s3, "a") as store, open_store("local.zarr") as local:
        assert list(store) == list(local) == [("tiny", "v0"), ("tiny", "v1")]
        for key in local:
            np.testing.assert_allclose(store[key].numpy(), local[key].numpy(), rtol=1e-5, atol=1e-6)
        assert list(store.catalog(refresh=False)["video"]) == ["v0", "v1"]
        with monkeypatch.context() as patched:
            breaking = Breaking(patched, store, puts=4)  # one entry, and the rows of the next
            report = extract("videos", store=store, recipes=recipe, overwrite=True)
        assert breaking.failed == 1
        assert [failure.video for failure in report.failures] == ["v1"]
        assert (store.videos("tiny"), store.verify(deep=True).problems) == (["v0"], [])
    assert Path("failures.jsonl").read_text().count("cannot be reached") == 1  # beside us: a bucket has no place for it
    again = extract("videos", store=s3, recipes=recipe)
    assert (again.written, again.already, again.failures) == (1, 1, [])
    with open_store(s3) as store:
        assert store.verify(deep=True).problems == []
        assert list(store.catalog(refresh=False)["video"]) == ["v0", "v1"]
