"""Downloads from a real server on this machine that drops, changes, refuses and confirms like those in the world."""

import base64
import contextlib
import hashlib
import json
import multiprocessing
import random
import shutil
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from layercrit.errors import ZooError
from layercrit.models.zoo import downloads
from layercrit.models.zoo.downloads import (
    Fetched,
    address_of,
    cache_folder,
    check_file,
    digest_of,
    fetch,
)

CONTENT = random.Random(1).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content``; each test sets how.

    Attributes:
        content: The bytes of the file.
        headers: Sent with every file.
        ranges: Whether ranges are answered.
        honest: Whether If-Range is looked at.
        endless: Whether the body never ends; its length is then not announced.
        drops: How many bytes each of the next answers sends before the connection ends.
        answers: Status, headers and body of the next answers, instead of the file.
        seen: Path and headers of all requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.headers, self.ranges, self.honest = CONTENT, {"ETag": '"one"'}, True, True
        self.drops, self.answers, self.seen, self.endless = [], [], [], False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.seen.append((self.path, dict(self.headers)))
        if server.answers:
            status, headers, body = server.answers.pop(0)
            self.answer(status, headers, body(self.path) if callable(body) else body)
            return
        start, asked = 0, self.headers.get("Range")
        if asked and server.ranges and (not server.honest or self.headers.get("If-Range") in server.headers.values()):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content) and start:
            self.answer(416, {}, b"")
            return
        if server.endless:
            self.pour(206 if start else 200, {"Content-Range": f"bytes {start}-"} if start else {})
            return
        body = server.content[start:]
        extra = {"Content-Range": f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"} if start else {}
        self.answer(206 if start else 200, {**server.headers, **extra}, body)

    def pour(self, status, headers):
        self.send_response(status)
        for name, value in {**self.server.headers, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(CONTENT)

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: self.server.drops.pop(0)] if self.server.drops else body)


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(downloads, "_PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(downloads, "_BLOCK", 100_000)


def ranges(server):
    return [headers.get("Range") for _, headers in server.seen]


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# Addresses and places


def test_address_of(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert address_of("https://example.org/a?b=c") == "https://example.org/a?b=c"
    assert address_of("hf:timm/resnet50.a1_in1k/model.safetensors") == (
        "https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors"
    )
    assert address_of("gdrive:1a-B_c") == "https://drive.usercontent.google.com/download?id=1a-B_c&export=download"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:80/")
    assert address_of("hf:a/b/c/d") == "http://mirror.example:80/a/b/resolve/main/c/d"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://example.org/x",
        "https://",
        "https:///x",
        "hf:a/b",
        "hf:a/../b/c",
        "hf:a/b/.git/config",
        "hf:a/b/c?d",
        "gdrive:",
        "gdrive:a&b",
        "gdrive:../a",
        "javascript:alert(1)",
    ],
)
def test_address_of__none(address):
    with pytest.raises(ZooError, match="is not a file's address"):
        address_of(address)


def test_cache_folder(monkeypatch):
    for name in ("LAYERCRIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "layercrit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/layercrit")
    monkeypatch.setenv("LAYERCRIT_CACHE", "~/y")
    assert cache_folder() == Path.home() / "y"


# The plain way


def test_fetch__whole_file(server, tmp_path):
    calls = []
    fetched = fetch(f"{server.url}/x", tmp_path / "deep" / "file", progress=lambda *numbers: calls.append(numbers))
    assert fetched == Fetched(tmp_path / "deep" / "file", len(CONTENT), SHA256)
    assert fetched.path.read_bytes() == CONTENT
    assert left(tmp_path / "deep") == ["file"]
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) >= 30


def test_fetch__present_file_is_checked_and_not_fetched_again(server, tmp_path):
    fetch(f"{server.url}/x", tmp_path / "file")
    assert fetch(f"{server.url}/x", tmp_path / "file", sha256=SHA256).sha256 == SHA256
    assert len(server.seen) == 1
    with pytest.raises(ZooError, match=f"has SHA-256 {SHA256}, expected 00"):
        fetch(f"{server.url}/x", tmp_path / "file", sha256="00")
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("expected", "message"),
    [({"size": 5}, "has 3000000 bytes, expected 5"), ({"sha256": "abcd"}, f"has SHA-256 {SHA256}, expected abcd")],
)
def test_fetch__another_file_than_expected(server, tmp_path, expected, message):
    with pytest.raises(ZooError, match=f"{message}.*not, or no longer, the file that was published"):
        fetch(f"{server.url}/x", tmp_path / "file", **expected)
    assert left(tmp_path) == []


def test_fetch__expected_size_and_beginning_of_the_hash(server, tmp_path):
    assert fetch(f"{server.url}/x", tmp_path / "file", size=len(CONTENT), sha256=SHA256[:8].upper()).sha256 == SHA256


def test_check_file(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    fetched = digest_of(tmp_path / "x")
    assert check_file(fetched, "https://example.org/x", None, None) is fetched
    with pytest.raises(ZooError, match=r"The file from https://example.org/x has SHA-256"):
        check_file(fetched, "https://example.org/x", None, "1")


def test_fetch__hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.answers = [(302, {"Location": f"{server.url}/cdn/abc?signed=1"}, b"")]
    assert fetch("hf:timm/resnet50/model.safetensors", tmp_path / "file").sha256 == SHA256
    assert [path for path, _ in server.seen] == ["/timm/resnet50/resolve/main/model.safetensors", "/cdn/abc?signed=1"]


def test_fetch__unknown_length(server, tmp_path):
    server.headers = {"Content-Length": None}
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256


# Broken connections


def test_fetch__resumes_where_it_broke_off(server, tmp_path):
    server.drops = [1_000_000, 500_000]
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256
    assert ranges(server) == [None, "bytes=1000000-", "bytes=1500000-"]
    assert server.seen[1][1]["If-Range"] == '"one"'
    assert left(tmp_path) == ["file"]


def test_fetch__many_breaks_with_progress_in_between_are_no_failure(server, tmp_path):
    server.drops = [200_000] * 12
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256
    assert len(server.seen) == 13


def test_fetch__later_call_goes_on(server, tmp_path):
    server.drops = [1_000_000, 0, 0, 0, 0, 0]
    with pytest.raises(ZooError, match=r"could not be downloaded: .*4 times in a row; 1000000 bytes .* are kept"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert left(tmp_path) == ["file.part", "file.part.json"]
    server.drops, server.seen = [], []
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256
    assert ranges(server) == ["bytes=1000000-"]


def test_fetch__last_modified_vouches_where_there_is_no_etag(server, tmp_path):
    server.headers, server.drops = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, [1_000_000]
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256
    assert server.seen[1][1]["If-Range"] == "Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}], ids=["no-validator", "weak-etag"])
def test_fetch__begins_anew_where_nothing_vouches_for_the_rest(server, tmp_path, headers):
    server.headers, server.drops = headers, [1_000_000]
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256
    assert ranges(server) == [None, None]


def test_fetch__begins_anew_without_ranges(server, tmp_path):
    server.ranges, server.drops = False, [1_000_000, 2_000_000]
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256
    assert ranges(server) == [None, "bytes=1000000-", "bytes=2000000-"]


@pytest.mark.parametrize("honest", [True, False], ids=["if-range", "if-range-ignored"])
def test_fetch__changed_file_is_not_glued_together(server, tmp_path, honest):
    server.drops, server.honest = [1_000_000, 0, 0, 0], honest
    with pytest.raises(ZooError):
        fetch(f"{server.url}/x", tmp_path / "file")
    server.content, server.headers, server.drops = CONTENT[::-1], {"ETag": '"two"'}, []
    assert fetch(f"{server.url}/x", tmp_path / "file").path.read_bytes() == CONTENT[::-1]


def test_fetch__part_of_another_address_is_not_used(server, tmp_path):
    server.drops = [1_000_000, 0, 0, 0]
    with pytest.raises(ZooError):
        fetch(f"{server.url}/x", tmp_path / "file")
    server.drops, server.seen = [], []
    assert fetch(f"{server.url}/y", tmp_path / "file").sha256 == SHA256
    assert ranges(server) == [None]


def test_fetch__part_is_longer_than_the_file(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    note = {"address": f"{server.url}/x", "validator": '"one"'}
    (tmp_path / "file.part.json").write_text(json.dumps(note))
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256


@pytest.mark.parametrize("note", ["", "[]", "{}", "\0"])
def test_fetch__damaged_note_beside_a_part(server, tmp_path, note):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.json").write_text(note)
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256


@pytest.mark.parametrize("status", [429, 500, 503])
def test_fetch__busy_server(server, tmp_path, status):
    server.answers = [(status, {}, b"")] * 2
    assert fetch(f"{server.url}/x", tmp_path / "file").sha256 == SHA256


def test_fetch__no_server(server, tmp_path):
    with pytest.raises(ZooError, match=r"could not be downloaded: URLError.*refused.*Check the network.*--from FILE"):
        fetch("http://127.0.0.1:1/x", tmp_path / "file")
    assert left(tmp_path) == []


# Refusals


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_fetch__file_is_not_given(server, tmp_path, status):
    server.answers = [(status, {"Content-Type": "text/html"}, b"<html>")]
    with pytest.raises(ZooError, match=rf"the server at 127.0.0.1:\d+ answered {status} .*may need a login"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert len(server.seen) == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_fetch__web_page_instead_of_the_file(server, tmp_path, kind):
    page = b"\n<!DOCTYPE html><html><title>Sign in &amp; pay</title>"
    server.answers = [(200, {"Content-Type": kind}, page)]
    with pytest.raises(ZooError, match="answered with a web page, titled 'Sign in & pay', not with the file"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert left(tmp_path) == []


def test_fetch__web_page_without_a_title(server, tmp_path):
    server.answers = [(200, {"Content-Type": "text/html"}, b"<p>Quota</p>")]
    with pytest.raises(ZooError, match="a web page, which begins with '<p>Quota</p>'"):
        fetch(f"{server.url}/x", tmp_path / "file")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example.org/x", "data:text/plain,x"])
def test_fetch__redirection_to_another_protocol(server, tmp_path, target):
    server.answers = [(302, {"Location": target}, b"")]
    with pytest.raises(ZooError, match=r"answered 302|which is refused"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert left(tmp_path) == []


def test_redirects__not_from_https_to_http():
    request = downloads.urllib.request.Request("https://example.org/x")
    with pytest.raises(ZooError, match=r"redirects to http://example.org/y, which is refused"):
        downloads._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/y")


def test_fetch__endless_redirection(server, tmp_path):
    server.answers = [(302, {"Location": "/x"}, b"")] * 30
    with pytest.raises(ZooError, match="answered 302"):
        fetch(f"{server.url}/x", tmp_path / "file")


def test_fetch__no_room(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 65 * 2**20))
    with pytest.raises(ZooError, match=r"has 0.07 GB left, too little for 0.00 GB more. Free some space"):
        fetch(f"{server.url}/x", tmp_path / "file")


def test_fetch__disk_full_while_writing(server, tmp_path, monkeypatch):
    full = Path("/dev/full").open("wb")  # noqa: SIM115 - fetch closes it
    monkeypatch.setattr(downloads._Part, "begin", lambda *_: full)
    with pytest.raises(ZooError, match=r"The disk is full: .*file is incomplete.*LAYERCRIT_CACHE"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert len(server.seen) == 1


def test_fetch__place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match=r"cannot be written \(File exists\)"):
        fetch(f"{server.url}/x", tmp_path / "file" / "below")


# Bodies without an end, or without a beginning


@pytest.mark.parametrize("size", [1_000_000, None], ids=["known-size", "unknown-size"])
def test_fetch__endless_body_is_stopped(server, tmp_path, size, monkeypatch):
    monkeypatch.setattr(downloads, "_UNDECLARED", 2_000_000)
    server.endless, calls = True, []
    with pytest.raises(ZooError, match=f"goes on sending after {size or 2_000_000} bytes"):
        fetch(f"{server.url}/x", tmp_path / "file", size=size, progress=lambda done, _: calls.append(done))
    assert left(tmp_path) == []
    assert len(server.seen) == 1
    assert max(calls) <= (size or 2_000_000)


def test_fetch__endless_rest_of_a_file(server, tmp_path):
    server.drops = [1_000_000, 0, 0, 0, 0]
    with pytest.raises(ZooError):
        fetch(f"{server.url}/x", tmp_path / "file")
    server.endless, server.drops = True, []
    with pytest.raises(ZooError, match="goes on sending after 3000000 bytes"):
        fetch(f"{server.url}/x", tmp_path / "file", size=len(CONTENT))
    assert left(tmp_path) == []


def test_fetch__endless_body_leaves_room_on_the_disk(server, tmp_path, monkeypatch):
    free = 64 * 2**20 + 500_000
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, free))
    monkeypatch.setattr(downloads, "_BLOCK", 600_000)
    server.endless = True
    with pytest.raises(ZooError, match="Free some space"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert len(server.seen) == 1


def test_fetch__another_size_is_refused_before_the_download(server, tmp_path):
    calls = []
    with pytest.raises(ZooError, match="has 3000000 bytes, expected 5"):
        fetch(f"{server.url}/x", tmp_path / "file", size=5, progress=lambda *numbers: calls.append(numbers))
    assert calls == []
    assert left(tmp_path) == []


@pytest.mark.parametrize("headers", [{}, {"Content-Length": None}], ids=["length-0", "no-length"])
def test_fetch__empty_answer_is_no_success(server, tmp_path, headers):
    server.content, server.headers = b"", {**server.headers, **headers}
    with pytest.raises(ZooError, match="is empty"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [202, 204, 205])
def test_fetch__answers_without_a_file(server, tmp_path, status):
    server.answers = [(status, {}, b"" if status != 202 else b"soon")]
    with pytest.raises(ZooError, match=f"answered {status}"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert left(tmp_path) == []


def test_fetch__empty_file_of_before_is_fetched_again(server, tmp_path):
    (tmp_path / "file").touch()
    assert fetch(f"{server.url}/x", tmp_path / "file").path.read_bytes() == CONTENT


def test_fetch__length_of_thousands_of_digits(server, tmp_path):
    server.answers = [(200, {"Content-Length": "9" * 5000}, CONTENT[:10])]
    assert fetch(f"{server.url}/x", tmp_path / "file").size == 10, "it says nothing, as no length does"


# Addresses that cannot be, and secrets in addresses


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("https://exam ple.org/x", r"contains ' '.*%20"),
        ("http:// example.org/x", "contains ' '"),
        ("https://example.org/my weights.pth", r"contains ' '.*%20"),
        ("https://example.org/ü.pth", r"contains 'ü'.*%C3%BC"),
        ("https://example.org/a\nb", r"contains '\\n'"),
        ("https://example.org:abc/x", "names no server"),
        ("https://example.org:99999/x", "names no server"),
        ("https://a..b/x", "names no server"),
        ("https://[::1/x", "names no server"),
        (f"https://{'a' * 64}.org/x", "names no server"),
        ("https://user:hunter2@/x", "names no server"),
        ("file:///etc/passwd", "does not begin with https"),
        ("ftp://example.org/x", "does not begin with https"),
        ("example.org/x", "does not begin with https"),
    ],
)
def test_fetch__impossible_address_is_no_network_fault(tmp_path, address, reason, monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda _: pytest.fail("it was tried"))
    with pytest.raises(ZooError, match=f"is not a file's address: it {reason}") as caught:
        fetch(address, tmp_path / "file")
    assert "network" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://mirror.example", "https://mir ror", "//u:hunter2@m"])
def test_fetch__impossible_endpoint(tmp_path, endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ZooError, match=r"HF_ENDPOINT is .*Expected https://SERVER") as caught:
        fetch("hf:a/b/c", tmp_path / "file")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("target", ["http://a..b/x", "http://127.0.0.1:abc/x", "http://[x/"])
def test_fetch__redirection_to_an_impossible_address(server, tmp_path, target):
    server.answers = [(302, {"Location": target}, b"")]
    with pytest.raises(ZooError, match=r"redirects to .*(which is refused: it names no server|cannot exist)"):
        fetch(f"{server.url}/x", tmp_path / "file")
    assert len(server.seen) == 1


def with_login(server):
    return server.url.replace("//", "//user:hunter2%21@")


def test_fetch__login_goes_to_its_server_only(server, tmp_path):
    server.answers = [(302, {"Location": f"{server.url}/elsewhere"}, b"")]
    assert fetch(f"{with_login(server)}/x", tmp_path / "file").sha256 == SHA256
    first, second = (headers.get("Authorization") for _, headers in server.seen)
    assert base64.b64decode(first.removeprefix("Basic ")) == b"user:hunter2!"
    assert second is None


FAULTS = {
    "refused": lambda s: s.answers.append((403, {}, b"")),
    "page": lambda s: s.answers.append((200, {"Content-Type": "text/html"}, b"<title>Sign in</title>")),
    "empty": lambda s: s.answers.append((200, {}, b"")),
    "no-content": lambda s: s.answers.append((204, {}, b"")),
    "dropped": lambda s: s.drops.extend([1000, 0, 0, 0, 0, 0]),
    "busy": lambda s: s.answers.extend([(503, {}, b"")] * 9),
    "redirected": lambda s: s.answers.append((302, {"Location": "ftp://user:hunter2%21@example.org/x"}, b"")),
    "nowhere": lambda s: s.answers.append((302, {"Location": "http://user:hunter2%21@a..b/x?token=hunter2"}, b"")),
    "endless": lambda s: setattr(s, "endless", True),
}


@pytest.mark.parametrize("query", ["", "?token=hunter2&x=1", "?X-Amz-Signature=hunter2"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fetch__passwords_are_never_shown_nor_stored(server, tmp_path, fault, query):
    FAULTS[fault](server)
    with pytest.raises(ZooError) as caught:
        fetch(f"{with_login(server)}/x{query}", tmp_path / "file", size=len(CONTENT), sha256=SHA256)
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value), "the server itself is named"
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.iterdir())


def test_fetch__passwords_are_not_shown_where_there_is_no_server(tmp_path):
    with pytest.raises(ZooError) as caught:
        fetch("http://user:hunter2@127.0.0.1:1/x", tmp_path / "file")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ZooError) as caught:
        fetch("user:hunter2@example.org/x", tmp_path / "file")
    assert "hunter2" not in str(caught.value)


def test_fetch__resumes_behind_a_login(server, tmp_path):
    server.drops = [1_000_000]
    assert fetch(f"{with_login(server)}/x", tmp_path / "file").sha256 == SHA256
    assert ranges(server) == [None, "bytes=1000000-"]


# Google Drive


def drive_page(fields, action="/uc"):
    inputs = "".join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in fields.items())
    form = f'<form id="download-form" action="{action}" method="get"><input type="submit" value="Go">{inputs}</form>'
    other = '<form action="/other"><input type="hidden" name="x" value="y"></form>'
    page = f"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>{form}{other}"
    return 200, {"Content-Type": "text/html; charset=utf-8", "Set-Cookie": "warned=yes"}, page.encode()


@pytest.fixture
def drive(server, monkeypatch):
    monkeypatch.setattr(downloads, "DRIVE", server.url)
    return server


def test_fetch__drive_small_file(drive, tmp_path):
    assert fetch("gdrive:1aB", tmp_path / "file").sha256 == SHA256
    assert drive.seen[0][0] == "/download?id=1aB&export=download"


def test_fetch__drive_confirmation(drive, tmp_path):
    fields = {"id": "1aB", "export": "download", "confirm": "t", "uuid": "a-b&amp;c"}
    drive.answers = [drive_page(fields)]
    assert fetch("gdrive:1aB", tmp_path / "file").sha256 == SHA256
    path, headers = drive.seen[1]
    split = urllib.parse.urlsplit(path)
    assert split.path == "/uc"
    assert dict(urllib.parse.parse_qsl(split.query)) == {**fields, "uuid": "a-b&c"}
    assert headers["Cookie"] == "warned=yes"


def test_fetch__drive_resumes_after_another_confirmation(drive, tmp_path):
    drive.answers = [drive_page({"id": "1aB", "uuid": "one"})]
    drive.drops = [10**6, 1_000_000, 0, 0, 0, 0]
    with pytest.raises(ZooError):
        fetch("gdrive:1aB", tmp_path / "file")
    drive.answers, drive.drops, drive.seen = [drive_page({"id": "1aB", "uuid": "two"})], [], []
    assert fetch("gdrive:1aB", tmp_path / "file").sha256 == SHA256
    assert drive.seen[1][1]["Range"] == "bytes=1000000-"


@pytest.mark.parametrize(
    "page",
    [
        (200, {"Content-Type": "text/html"}, b"<title>Google Drive - Quota exceeded</title><p>Too many users"),
        (200, {"Content-Type": "text/html"}, b"<title>Quota exceeded</title><form action='/login'></form>"),
        (200, {"Content-Type": "text/html"}, b"<title>Quota exceeded</title><form><![x"),
        (
            200,
            {"Content-Type": "text/html"},
            b"<title>Quota exceeded</title><form><input type='hidden' name='id'></form>",
        ),
    ],
    ids=["no-form", "form-without-id", "malformed", "form-without-action"],
)
def test_fetch__drive_quota(drive, tmp_path, page):
    drive.answers = [page]
    with pytest.raises(ZooError, match=r"gdrive:1aB: the server answered with a web page, titled '.*Quota exceeded'"):
        fetch("gdrive:1aB", tmp_path / "file")
    assert len(drive.seen) == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("action", ["ftp://example.org/x", "http://example.org/x", "file:///etc/passwd"])
def test_fetch__drive_form_that_leads_away(drive, tmp_path, action):
    drive.answers = [drive_page({"id": "1aB"}, action)]
    with pytest.raises(ZooError, match="titled 'Google Drive - Virus scan warning'"):
        fetch("gdrive:1aB", tmp_path / "file")
    assert len(drive.seen) == 1


def test_fetch__drive_asks_twice(drive, tmp_path):
    drive.answers = [drive_page({"id": "1aB"}), drive_page({"id": "1aB"})]
    with pytest.raises(ZooError, match="web page, titled 'Google Drive - Virus scan warning'"):
        fetch("gdrive:1aB", tmp_path / "file")


# Several at once


def fetch_in_a_process(url, path, hashes):
    hashes.put(fetch(url, path).sha256)


def test_fetch__processes_at_once_fetch_one_file_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    hashes = context.Queue()
    arguments = (f"{server.url}/x", tmp_path / "file", hashes)
    processes = [context.Process(target=fetch_in_a_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert [hashes.get(timeout=30) for _ in processes] == [SHA256] * 4
    for process in processes:
        process.join()
    assert len(server.seen) == 1
    assert left(tmp_path) == ["file"]
