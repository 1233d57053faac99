"""Download one file: resumed where it broke off, checked, and put in place only once complete.

An address is ``https://...`` (or ``http://...``), ``hf:OWNER/REPOSITORY/FILE`` for the Hugging Face Hub, whose server
``HF_ENDPOINT`` may replace, or ``gdrive:ID`` for Google Drive. The hub is accessed over plain HTTPS like any
other server: one way to resume, one way to check, and nothing stored twice in a second cache.
"""

import base64
import contextlib
import hashlib
import html
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from layercrit.errors import DISK_FULL, ZooError
from layercrit.foreign_files import read_json

__all__ = ["DRIVE", "Fetched", "address_of", "cache_folder", "check_file", "digest_of", "fetch", "shown"]

DRIVE = "https://drive.usercontent.google.com"
"""The server of Google Drive's files."""

Progress = Callable[[int, int | None], object]
"""Called with how many bytes have arrived, and how many there are if the server says so."""

_LOG = logging.getLogger(__name__)

_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between attempts that brought nothing new
_TIMEOUT = 60.0  # seconds without a byte after which a connection counts as dropped
_BLOCK = 1 << 20
_MARGIN = 64 * 2**20  # bytes of disk left free
_UNDECLARED = 4 * 2**30  # bytes after which a file whose size nobody has said counts as endless
_SECRET = re.compile(r"([?&][^=&#]*(?:token|secret|passw|signature|credential|api_?key)[^=&#]*=)[^&#]+", re.IGNORECASE)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be another one a little later
_DROPPED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Fetched:
    """A file that has been downloaded.

    Attributes:
        path: where it is.
        size: in bytes.
        sha256: SHA-256 of its bytes, hexadecimal.
    """

    path: Path
    size: int
    sha256: str


def cache_folder() -> Path:
    """Return the cache's folder: ``LAYERCRIT_CACHE``, else ``layercrit`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get("LAYERCRIT_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layercrit"


def address_of(address: str) -> str:
    """Return the URL of an address as the module describes.

    Raises:
        ZooError: it is not an address, leads out of the repository that it names, or is none that can exist.
    """
    kind, _, rest = address.partition(":")
    parts = rest.split("/")
    if kind == "hf" and len(parts) >= 3 and all(re.fullmatch(r"\w[\w.+-]*", part) for part in parts):
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{'/'.join(parts[:2])}/resolve/main/{'/'.join(parts[2:])}"
    if kind == "gdrive" and re.fullmatch(r"[\w-]+", rest):
        return f"{DRIVE}/download?id={rest}&export=download"
    fault = _fault_of(address)
    if fault is None:
        return address
    hidden = re.sub(r"^([a-z][\w+.-]*://)?.*@", r"\1", shown(address))  # whatever may be a password, as this is no URL
    raise ZooError(
        f"{hidden!r} is not a file's address: it {fault}. Expected https://..., hf:OWNER/REPOSITORY/FILE or gdrive:ID."
    )


def _fault_of(url: str) -> str | None:
    """Say why no server can have a URL; None if one can."""
    try:
        split = urllib.parse.urlsplit(url)
        host, _ = split.hostname, split.port
        if host:
            host.encode("idna")
    except ValueError:  # UnicodeError, at a host that no name server would take, is one
        return "names no server that can exist"
    if split.scheme not in ("http", "https"):
        return "does not begin with https://"
    beyond = url.partition("//")[2].partition("/")[2]  # a server's name may have other letters than ASCII
    if strange := re.search(r"[\x00-\x20\x7f]", url) or re.search(r"[^\x21-\x7e]", beyond):
        return f"contains {strange[0]!r}, to be written as {urllib.parse.quote(strange[0], errors='replace')}"
    return None if host and re.fullmatch(r"[\w.:%-]+", host) else "names no server"


def shown(address: str) -> str:
    """Return an address for messages and records: without user name and password, and with tokens masked."""
    return _SECRET.sub(r"\1***", re.sub(r"//[^/?#\s]*@", "//", address))


def digest_of(path: Path) -> Fetched:
    """Return size and SHA-256 of a file, read block by block."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        return Fetched(path, file.tell(), digest.hexdigest())


def fetch(
    address: str,
    path: str | Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Fetched:
    """Download a file, or check the one that exists already.

    When the connection breaks, what has arrived is kept in ``PATH.part``, and this or a later call resumes from there
    if the server confirms that the file is still the same; otherwise it starts again. Processes that download the same
    file at once wait for each other.

    Args:
        address: see the module.
        path: where to put the file; its folder is created.
        size: the expected size in bytes.
        sha256: the expected SHA-256, or its first digits, hexadecimal.
        progress: called after every block.

    Raises:
        ZooError: the address is wrong, the server does not send the file, it is empty, endless, a web page or not the
            expected file, or it cannot be stored.
    """
    path, url = Path(path), address_of(address)
    if fault := _fault_of(url):
        raise ZooError(f"HF_ENDPOINT is {shown(os.environ['HF_ENDPOINT'])!r}: it {fault}. Expected https://SERVER.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if path.exists() and path.stat().st_size:
                return check_file(digest_of(path), address, size, sha256)
            part = _Part(path)
            _LOG.info("downloading %s", shown(address))
            _bring(part, address, url, size, progress)
            try:
                _refuse_page(part.path, address)
                fetched = check_file(digest_of(part.path), address, size, sha256)
            except ZooError:
                part.discard()
                raise
            part.path.replace(path)
            part.discard()
            return Fetched(path, fetched.size, fetched.sha256)
    except OSError as error:
        raise _not_stored(path, error) from error


def _not_stored(path: Path, error: OSError) -> ZooError:
    if error.errno in DISK_FULL:
        return ZooError(
            f"The disk is full: {path} is incomplete. Free some space, or choose another folder with "
            "LAYERCRIT_CACHE, and run again; the download resumes where it stopped."
        )
    return ZooError(
        f"{path} cannot be written ({error.strerror or error}). Choose another folder with LAYERCRIT_CACHE."
    )


def check_file(fetched: Fetched, address: str, size: int | None, sha256: str | None) -> Fetched:
    """Return a file if it has the expected size and hash; None means unknown, but no file is empty.

    Raises:
        ZooError: it is not the expected file.
    """
    if not fetched.size:
        raise ZooError(
            f"The file from {shown(address)} is empty: the server answered without one. Try again later, or open "
            "the address in a browser and pass the file that you get to `layercrit zoo fetch ID --from FILE`."
        )
    if size is not None and fetched.size != size:
        wrong = f"has {fetched.size} bytes, expected {size}"
    elif sha256 is not None and not fetched.sha256.startswith(sha256.lower()):
        wrong = f"has SHA-256 {fetched.sha256}, expected {sha256}"
    else:
        return fetched
    raise ZooError(
        f"The file from {shown(address)} {wrong}. It is not, or no longer, the file that was published, and is not "
        "used."
    )


class _Part:
    """The part of a file that has arrived, with what tells whether the server's file is still the same."""

    def __init__(self, whole: Path) -> None:
        self.path = whole.with_name(f"{whole.name}.part")
        self._note = whole.with_name(f"{whole.name}.part.json")

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self, address: str) -> str | None:
        """The server's validator of the file when this part arrived, if it can be used to resume."""
        try:
            note = read_json(self._note)
            return str(note["validator"]) if note["address"] == shown(address) and self.size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, address: str, validator: str | None) -> BinaryIO:
        """Discard what arrived and open an empty part."""
        self.discard()
        if validator is not None:
            self._note.write_text(json.dumps({"address": shown(address), "validator": validator}), encoding="utf-8")
        return self.path.open("wb")

    def discard(self) -> None:
        """Remove the part."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


def _bring(part: _Part, address: str, url: str, size: int | None, progress: Progress | None) -> None:
    """Download until the part is complete; an attempt that got further than any before does not count as failed."""
    failures, most = 0, part.size
    while True:
        try:
            _attempt(part, address, url, size, progress)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and part.size:
                part.discard()  # the file is shorter than what came before: another one
                continue
            if error.code not in _PASSING:
                raise _refused(address, url, error) from error
            reason: Exception = error
        except _DROPPED as error:
            reason = error
        failures = 1 if part.size > most else failures + 1
        most = max(most, part.size)
        if failures > len(_PAUSES):
            raise ZooError(
                f"{shown(address)} could not be downloaded: {_words(reason)}, {failures} times in a row; {part.size} "
                f"bytes have arrived and are kept. Check the network and run again. Or download {shown(url)} by other "
                "means and use `layercrit zoo fetch ID --from FILE`."
            ) from reason
        time.sleep(_PAUSES[failures - 1])


def _refused(address: str, url: str, error: urllib.error.HTTPError) -> ZooError:
    return ZooError(
        f"{shown(address)}: the server at {urllib.parse.urlsplit(shown(url)).netloc} answered {error.code} "
        f"{shown(str(error.reason))}. The file may have moved, or may need a login: open {shown(url)} in a browser, "
        "and pass the file that you get to `layercrit zoo fetch ID --from FILE`."
    )


def _words(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"{type(error).__name__}: {reason}" if str(reason) else type(error).__name__


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other servers, but not to other protocols, nor from HTTPS to plain HTTP."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        redirects = f"{shown(req.full_url)} redirects to {shown(newurl)}, which is refused: it"
        if fault := _fault_of(newurl):
            raise ZooError(f"{redirects} {fault}.")
        if req.type == "https" and newurl.startswith("http:"):
            raise ZooError(f"{redirects} is not protected by HTTPS.")
        return super().redirect_request(req, fp, code, msg, headers, _without_login(newurl)[0])


def _opener() -> urllib.request.OpenerDirector:
    """An opener with cookies, which Google Drive needs between page and file."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(), _Redirects())
    opener.addheaders = [("User-Agent", "layercrit"), ("Accept-Encoding", "identity")]
    return opener


def _attempt(part: _Part, address: str, url: str, size: int | None, progress: Progress | None) -> None:
    """Download what is missing over one connection.

    Raises:
        ConnectionError: the connection ended before the file did.
        ZooError: the server answers with a web page or another file, or does not end.
    """
    opener = _opener()
    validator = part.validator(address)
    wanted = {} if validator is None else {"Range": f"bytes={part.size}-", "If-Range": validator}
    response = _open(opener, url, wanted)
    if address.startswith("gdrive:") and _is_page(response):
        with response:
            form = _confirmation(_read(response).decode(errors="replace"), response.url, address)
        response = _open(opener, form, wanted)
    with response:
        if _is_page(response):
            raise _page(address, _read(response))
        start = part.size if _continues(response, part, validator, address) else 0
        total = _total(response, start)
        if total is not None:
            check_file(Fetched(part.path, total, ""), address, size, None)  # before anything is downloaded for nothing
            _check_room(part.path, total, start)
        with part.path.open("ab") if start else part.begin(address, _validator(response)) as file:
            while block := _read(response):
                if file.tell() + len(block) > (most := size or total or _UNDECLARED):
                    part.discard()
                    raise ZooError(
                        f"{shown(address)}: the server goes on sending after {most} bytes, the most that was expected. "
                        "It is not the file that was published, and is not used."
                    )
                if total is None:
                    _check_room(part.path, file.tell() + len(block), file.tell())
                file.write(block)
                if progress is not None:
                    progress(file.tell(), total)
    if total is not None and part.size < total:
        raise ConnectionError(f"the connection ended after {part.size} of {total} bytes")


def _total(response: Any, start: int) -> int | None:
    """The size of the whole file as the server states it; None if it does not."""
    rest = re.fullmatch(r"\d{1,18}", response.headers.get("Content-Length", ""))
    return start + int(rest[0]) if rest else None


@contextlib.contextmanager
def _over_the_net() -> Iterator[None]:
    """Inside, any error of the operating system is about the connection, not about the disk."""
    try:
        yield
    except _DROPPED:
        raise
    except OSError as error:
        raise ConnectionError(str(error)) from error


def _open(opener: urllib.request.OpenerDirector, url: str, headers: dict[str, str]) -> Any:
    bare, login = _without_login(url)
    request = urllib.request.Request(bare, headers=headers)  # noqa: S310
    if login:  # for this server alone, not for those that it redirects to
        encoded = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    try:
        with _over_the_net():
            return opener.open(request, timeout=_TIMEOUT)
    except ZooError:
        raise
    except ValueError as error:  # our own address has been checked, so it is that of a redirection
        raise ZooError(f"{shown(url)} redirects to an address that cannot exist.") from error


def _without_login(url: str) -> tuple[str, str]:
    """Split a URL into one without user name and password, and these."""
    split = urllib.parse.urlsplit(url)
    login, at, server = split.netloc.rpartition("@")
    return (split._replace(netloc=server).geturl(), login) if at else (url, "")


def _read(response: Any) -> bytes:
    with _over_the_net():
        return bytes(response.read(_BLOCK))


def _continues(response: Any, part: _Part, validator: str | None, address: str) -> bool:
    """Whether a response is the rest of a file of which a part has arrived."""
    if response.status == http.HTTPStatus.OK:
        return False
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        raise ZooError(
            f"{shown(address)}: the server answered {response.status} {response.reason}, without a file. Try again "
            "later, or open the address in a browser and pass the file that you get to `layercrit zoo fetch ID --from "
            "FILE`."
        )
    first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    # A server that ignores If-Range sends the rest of another file, under another name for it.
    if first is None or int(first[1]) != part.size or _validator(response) not in (None, validator):
        part.discard()
        raise ConnectionError("the server sent a part of the file that was not requested")
    return True


def _validator(response: Any) -> str | None:
    """A server's strong validator of this version of a file (RFC 9110, section 13.1.5)."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return str(etag)
    modified = response.headers.get("Last-Modified")
    return str(modified) if modified else None


def _check_room(path: Path, total: int | None, start: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if total is not None and total - start > free - _MARGIN:
        raise ZooError(
            f"{path.parent} has {free / 1e9:.2f} GB left, too little for {(total - start) / 1e9:.2f} GB more. Free "
            "some space, or choose another folder with LAYERCRIT_CACHE."
        )


def _is_page(response: Any) -> bool:
    return str(response.headers.get("Content-Type", "")).lower().startswith(("text/html", "application/xhtml"))


def _refuse_page(path: Path, address: str) -> None:
    """Refuse a web page that arrived under another content type."""
    with path.open("rb") as file:
        start = file.read(4096)
    if start[:512].lstrip().startswith(b"<"):
        raise _page(address, start)


def _page(address: str, content: bytes) -> ZooError:
    """Describe a web page that arrived instead of a file."""
    text = content.decode(errors="replace")
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    named = html.unescape(title[1]).strip() if title else ""
    about = f", titled {named[:200]!r}" if named else f", which begins with {text[:80]!r}"
    return ZooError(
        f"{shown(address)}: the server answered with a web page{about}, not with the file. Open the address in a "
        "browser and pass the file that you get to `layercrit zoo fetch ID --from FILE`, or try again once the quota "
        "has reset."
    )


class _Form(HTMLParser):
    """The form of a page that leads to a file: its action, and its hidden fields."""

    def __init__(self) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form" and not self.action:
            self.action, self._inside = given.get("action", ""), True
        elif tag == "input" and self._inside and given.get("type", "").lower() == "hidden" and given.get("name"):
            self.fields[given["name"]] = given.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False


def _confirmation(page: str, url: str, address: str) -> str:
    """Where Google Drive's page about files too large for its virus scan leads to.

    Raises:
        ZooError: it is another page, as when a quota is used up.
    """
    form = _Form()
    with contextlib.suppress(AssertionError):  # which the parser raises at some malformed pages
        form.feed(page)
    target = urllib.parse.urljoin(url, form.action)
    if not form.action or "id" not in form.fields or not target.startswith(("https://", f"{DRIVE}/")):
        raise _page(address, page.encode())
    return f"{target.partition('?')[0]}?{urllib.parse.urlencode(form.fields)}"
