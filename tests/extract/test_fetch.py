"""Fetching: against servers of every temper on this machine, in threads, and from several processes at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tad.errors import RecipeError, WeightsError
from tad.extract import fetch as module
from tad.extract.fetch import fetch, fetched, place_of, verify, weights_folder
from tad.extract.published import Published

BODY = random.Random(0).randbytes(3 << 20)
OTHER = BODY[::-1]


@dataclass
class Server:
    """One file, served as the fields say; they may change between requests."""

    body: bytes = BODY
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True  # honours Range, and If-Range
    careless: bool = False  # honours Range whatever If-Range says
    cut: list[int | None] = field(default_factory=list)  # bytes after which each of the next answers ends
    statuses: list[int] = field(default_factory=list)  # of the next answers, instead of the file
    length: bool = True  # tells how long the file is
    packed: bool = False
    stall: threading.Event | None = None  # in the middle of the file, until this is set
    seen: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of each request
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "WAITS_S", (0.0, 0.0, 0.0))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.seen.append((self.path, wanted))
            if state.statuses:
                self.send_response(state.statuses.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            begin = 0
            same = state.careless or self.headers.get("If-Range") in (state.etag, state.modified)
            if wanted and state.ranges and same:
                begin = int(wanted.removeprefix("bytes=").rstrip("-"))
                if begin >= len(state.body):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(state.body) - 1}/{len(state.body)}")
            else:
                self.send_response(200)
            part = state.body[begin:]
            if state.length:
                self.send_header("Content-Length", str(len(part)))
            if state.packed:
                self.send_header("Content-Encoding", "gzip")
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.modified:
                self.send_header("Last-Modified", state.modified)
            self.end_headers()
            if state.stall is not None:
                self.wfile.write(part[: len(part) // 2])
                self.wfile.flush()
                state.stall.wait(60)
                return
            self.wfile.write(part[: state.cut.pop(0) if state.cut else None])

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/model.pth"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def silent(_: str) -> None:
    pass


def get(url: str, folder: Path) -> Path:
    return fetch(url, folder=folder, say=silent)


def ranges(server: Server) -> list[str | None]:
    return [wanted for _, wanted in server.seen]


def test_a_file_comes_whole_is_recorded_and_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    path = get(server.url, tmp_path)
    assert path.read_bytes() == BODY
    assert path == place_of(server.url, tmp_path) == fetched(server.url, tmp_path)
    record = json.loads(path.with_name("model.pth.json").read_text())
    assert record == {"url": server.url, "sha256": hashlib.sha256(BODY).hexdigest(), "bytes": len(BODY)}
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.pth", "model.pth.json", "model.pth.lock"]
    server.statuses = [500] * 9
    assert get(server.url, tmp_path) == path
    assert len(server.seen) == 1


def test_progress_counts_the_bytes(server: Server, tmp_path: Path) -> None:
    done: list[float] = []

    class Bar:
        def __init__(self, total: float) -> None:
            done.append(-total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, n: float = 1.0, note: str = "") -> None:
            done.append(n)

    server.cut = [1 << 20]
    fetch(server.url, folder=tmp_path, say=silent, progress=lambda total, label, unit: Bar(total))
    assert [value for value in done if value < 0] == [-3, -3]
    assert done[-1] + done[-2] + sum(done[done.index(-3, 1) + 1 : -2]) == 3  # the second bar begins where it went on


@pytest.mark.parametrize("version", ["etag", "modified"])
def test_a_truncated_body_is_noticed_and_resumed(server: Server, tmp_path: Path, version: str) -> None:
    if version == "modified":
        server.etag, server.modified = None, "Wed, 21 Oct 2015 07:28:00 GMT"
    server.cut = [1_000_000, 500_000]
    assert get(server.url, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=1000000-", "bytes=1500000-"]


def test_nothing_has_the_final_name_before_it_is_whole_and_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut = [1000, 0, 0]
    with pytest.raises(WeightsError, match=r"ended after 1000 of 3145728 bytes.*Try again.*--from FILE"):
        get(server.url, tmp_path)
    place = place_of(server.url, tmp_path)
    assert not place.exists()
    assert place.with_name("model.pth.partial").stat().st_size == 1000
    assert get(server.url, tmp_path).read_bytes() == BODY
    assert ranges(server)[-1] == "bytes=1000-"


def test_a_server_that_ignores_ranges_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut = False, [1000]
    assert get(server.url, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=1000-"]


@pytest.mark.parametrize("careless", [False, True])
def test_parts_of_two_versions_are_never_joined(server: Server, tmp_path: Path, careless: bool) -> None:
    server.careless, server.cut = careless, [2000, 0, 0]
    with pytest.raises(WeightsError):
        get(server.url, tmp_path)
    server.body, server.etag = OTHER, '"v2"'
    assert get(server.url, tmp_path).read_bytes() == OTHER


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_version_nothing_is_resumed(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.etag, server.careless, server.cut = etag, True, [2000]
    assert get(server.url, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, None]


def test_a_partial_file_that_is_already_whole_or_too_long_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.cut = [1000, 0, 0]
    with pytest.raises(WeightsError):
        get(server.url, tmp_path)
    place_of(server.url, tmp_path).with_name("model.pth.partial").write_bytes(BODY + b"more")
    assert get(server.url, tmp_path).read_bytes() == BODY


def test_a_partial_file_of_another_address_or_with_a_damaged_mark_is_not_used(server: Server, tmp_path: Path) -> None:
    place = place_of(server.url, tmp_path)
    place.parent.mkdir(parents=True)
    for mark in ('{"url": "http://elsewhere/", "etag": "\\"v1\\""}', "{", "[]"):
        place.with_name("model.pth.partial").write_bytes(b"x" * 1000)
        place.with_name("model.pth.partial.json").write_text(mark)
        assert get(server.url, tmp_path).read_bytes() == BODY
        place.unlink()
    assert ranges(server) == [None] * 3


def test_without_a_length_the_end_is_the_end(server: Server, tmp_path: Path) -> None:
    server.length = False
    assert get(server.url, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize(("statuses", "requests"), [([503, 500], 3), ([404], 1), ([403], 1), ([503] * 3, 3)])
def test_what_may_pass_is_tried_again_and_what_is_refused_is_not(
    server: Server, tmp_path: Path, statuses: list[int], requests: int
) -> None:
    server.statuses = list(statuses)
    if len(statuses) == 2:
        assert get(server.url, tmp_path).read_bytes() == BODY
    else:
        with pytest.raises(WeightsError, match=f"answered {statuses[0]}"):
            get(server.url, tmp_path)
        assert not place_of(server.url, tmp_path).exists()
    assert len(server.seen) == requests


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>sign in</html>", b"\n <HTML>"])
def test_a_web_page_is_no_checkpoint(server: Server, tmp_path: Path, page: bytes) -> None:
    server.body = page
    with pytest.raises(WeightsError, match="a web page instead of the file"):
        get(server.url, tmp_path)
    assert [p.name for p in place_of(server.url, tmp_path).parent.iterdir()] == ["model.pth.lock"]


def test_a_packed_answer_is_refused(server: Server, tmp_path: Path) -> None:
    server.packed = True
    with pytest.raises(WeightsError, match=r"packed \(gzip\)"):
        get(server.url, tmp_path)


# ---- hashes ----------------------------------------------------------------------------------------------------------


def test_a_hash_in_the_name_is_compared_at_once(server: Server, tmp_path: Path) -> None:
    right = hashlib.sha256(BODY).hexdigest()[:8]
    good = server.url.replace("model", f"model_20220818-{right}")
    assert get(good, tmp_path).read_bytes() == BODY
    bad = server.url.replace("model", "model-00000000")
    with pytest.raises(WeightsError, match=rf"sha256 is {right}.*begins with 00000000"):
        get(bad, tmp_path)
    place = place_of(bad, tmp_path)
    assert [p.name for p in place.parent.iterdir()] == [f"{place.name}.lock"]
    place.write_bytes(BODY)  # put there by hand
    with pytest.raises(WeightsError, match="begins with 00000000"):
        get(bad, tmp_path)


def test_a_file_that_changes_after_its_first_use_is_refused(server: Server, tmp_path: Path) -> None:
    path = get(server.url, tmp_path)
    path.write_bytes(OTHER)
    with pytest.raises(WeightsError, match=r"another file than at its first use.*delete"):
        get(server.url, tmp_path)
    path.unlink()
    server.body, server.etag = OTHER, '"v2"'
    with pytest.raises(WeightsError, match="another file than at its first use"):
        get(server.url, tmp_path)
    assert not path.exists()
    path.with_name("model.pth.json").unlink()  # what the message says where the new file is meant
    assert get(server.url, tmp_path).read_bytes() == OTHER


def test_a_file_without_a_record_gets_one_at_its_first_use(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"weights")
    assert verify(path) == hashlib.sha256(b"weights").hexdigest()
    path.write_bytes(b"changed")
    with pytest.raises(WeightsError, match="first use"):
        verify(path)
    for record in ("{", "{}", '{"sha256": 7}'):
        (tmp_path / "a.pth.json").write_text(record)
        with pytest.raises(WeightsError, match="delete it"):
            verify(path)


# ---- from files ------------------------------------------------------------------------------------------------------


def test_file_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS_S", (0.0, 99.0))
    source = tmp_path / "ein Gewicht é.pth"
    source.write_bytes(BODY)
    assert get(source.as_uri(), tmp_path / "kept").read_bytes() == BODY
    with pytest.raises(WeightsError, match="no connection"):
        get((tmp_path / "gone.pth").as_uri(), tmp_path / "kept")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Published]:
    def add(name: str, **values: object) -> Published:
        defaults: dict[str, object] = {
            "backbone": "tiny", "source": "tests", "data": "noise", "licence": "CC-BY-NC-4.0", "file": "model.pth",
        }  # fmt: skip
        entry = Published(**{**defaults, **values})  # type: ignore[arg-type]
        monkeypatch.setitem(module.PUBLISHED, name, entry)
        return entry

    return add


def test_a_name_is_fetched_with_its_licence(
    server: Server, tmp_path: Path, listed: Callable[..., Published], capsys: pytest.CaptureFixture[str]
) -> None:
    listed("noise_a", urls=(server.url,), noncommercial=True)
    listed("noise_b", urls=(server.url,), licence="MIT")
    path = fetch("noise_a", folder=tmp_path)
    assert path == tmp_path / "noise_a" / "model.pth"
    assert fetch("noise_b", folder=tmp_path) != path  # the same file name, another model
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "noise_a: licence CC-BY-NC-4.0, NOT FOR COMMERCIAL USE",
        "noise_b: licence MIT",
    ]


def test_a_second_address_is_tried(server: Server, tmp_path: Path, listed: Callable[..., Published]) -> None:
    server.statuses = [404]
    listed("noise", urls=(server.url, f"{server.url}?mirror"))
    assert fetch("noise", folder=tmp_path, say=silent).read_bytes() == BODY
    assert [path for path, _ in server.seen] == ["/model.pth", "/model.pth?mirror"]


def test_offline_the_message_says_where_to_get_it_and_where_to_put_it(
    server: Server, tmp_path: Path, listed: Callable[..., Published]
) -> None:
    url = "http://127.0.0.1:9/model.pth"  # nobody listens there
    listed("noise", urls=(url,))
    with pytest.raises(WeightsError) as caught:
        fetch("noise", folder=tmp_path, say=silent)
    for words in (url, "tad weights fetch noise --from FILE", str(tmp_path / "noise" / "model.pth")):
        assert words in str(caught.value)
    (tmp_path / "download (1).pth").write_bytes(BODY)
    path = fetch("noise", folder=tmp_path, source=tmp_path / "download (1).pth", say=silent)
    assert path.read_bytes() == BODY
    assert fetch("noise", folder=tmp_path) == path
    assert (tmp_path / "download (1).pth").exists()


def test_weights_without_an_address_say_how_to_get_them(tmp_path: Path, listed: Callable[..., Published]) -> None:
    listed("noise", by_hand="They lie in somebody's drive", file="n-00000000.pth")
    with pytest.raises(WeightsError, match=r"no address.*somebody's drive.*--from FILE"):
        fetch("noise", folder=tmp_path)
    with pytest.raises(WeightsError, match=r"gone.pth is no file"):
        fetch("noise", folder=tmp_path, source=tmp_path / "gone.pth")
    (tmp_path / "wrong").write_bytes(BODY)
    with pytest.raises(WeightsError, match=r"wrong is damaged or another file"):
        fetch("noise", folder=tmp_path, source=tmp_path / "wrong", say=silent)
    assert [p.name for p in (tmp_path / "noise").iterdir()] == ["n-00000000.pth.lock"]


@pytest.mark.parametrize("name", ["slow_r50_8x8_kinetics40", "ftp://host/x.pth", "", "/etc/hosts"])
def test_what_is_neither_a_name_nor_an_address(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither an address"):
        fetch(name, folder=tmp_path)


@pytest.mark.parametrize(
    "url", ["http://host/", "http://host/..", "http://host/a%2F..%2F..%2Fb", "http://host/.x?y=/z"]
)
def test_names_in_addresses_never_leave_the_folder(url: str, tmp_path: Path) -> None:
    place = place_of(url, tmp_path)
    assert place.parent.parent == tmp_path
    assert place.name not in ("", ".", "..")
    assert place_of(f"{url}&z", tmp_path).parent != place.parent


def test_the_folder_is_an_argument_a_variable_or_torch_hub_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAD_WEIGHTS", str(tmp_path / "variable"))
    assert weights_folder(tmp_path) == tmp_path
    assert weights_folder() == tmp_path / "variable"
    monkeypatch.delenv("TAD_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert weights_folder() == tmp_path / "torch" / "hub" / "tad"
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="TAD_WEIGHTS=FOLDER"):
        fetch("http://127.0.0.1:9/x.pth", folder=tmp_path / "file", say=silent)


# ---- processes and proxies -------------------------------------------------------------------------------------------


def test_two_processes_fetch_once(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys; from tad.extract.fetch import fetch;"
        "print('ready', flush=True); sys.stdin.readline(); print(fetch(sys.argv[1], folder=sys.argv[2]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", code, server.url, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in processes:  # both have imported before either begins
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert found[0] == found[1]
    assert Path(found[0]).read_bytes() == BODY
    assert len(server.seen) == 1


def test_a_killed_process_leaves_what_another_goes_on_with(server: Server, tmp_path: Path) -> None:
    server.stall = threading.Event()
    code = "import sys; from tad.extract.fetch import fetch; fetch(sys.argv[1], folder=sys.argv[2])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    child = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)], env=environment)
    place = place_of(server.url, tmp_path)
    partial = place.with_name("model.pth.partial")
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size >= 1 << 20):  # a whole chunk is on the disk
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()
    server.stall.set()
    server.stall = None
    assert not place.exists()
    have = partial.stat().st_size
    assert get(server.url, tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={have}-"]


def test_proxies_are_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = server.url.removesuffix("/model.pth")
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert get("http://weights.invalid/model.pth", tmp_path).read_bytes() == BODY
    assert server.seen == [("http://weights.invalid/model.pth", None)]
