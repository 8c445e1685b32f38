"""A place that lies: no name leads out of its folder, no redirect to another host, no more is taken in than asked."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cache_servers as servers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheCorrupt, CacheError, CacheStorageError, CacheUnreachable
from cache_schema.storage.http import _client
from cache_schema.storage.names import is_inside
from cache_schema.storage.places import folder_at
from cache_schema.storage.remote import RemoteFolder


class _Liar(BaseHTTPRequestHandler):
    listing = ""

    def do_GET(self) -> None:
        if self.path.endswith("/drip"):
            self.send_response(206)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                while not threading.Event().wait(0.02):
                    self.wfile.write(b"x")
            return
        if self.path.endswith("/endless"):
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                return
        body = self.listing.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        allowed = self.headers["Authorization"] == "Basic bWlhOnNlY3JldA=="  # mia:secret
        answer = 302 if self.path.endswith("/astray") else 401 if "/private" in self.path and not allowed else 200
        self.send_response(answer)
        self.send_header("ETag", '"1"')
        self.send_header("Location", "http://[bad/?token=abc")
        self.send_header("Content-Length", "1000" if self.path.endswith(("/endless", "/drip")) else "9" * 17)
        self.end_headers()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        far = self.path.startswith("/far/")
        body = b"<Error><Code>PermanentRedirect</Code><Message>Use the specified endpoint.</Message></Error>"
        if not far:
            body = b"<Error><Message>Conditional object PUTs are not supported.</Message><Id>tx429503</Id></Error>"
        self.send_response(301 if far else 501)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def liar() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Liar)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/cache"
    server.shutdown()
    server.server_close()


def test_a_bucket_whose_server_does_not_know_a_request_is_named_and_not_asked_until_the_deadline(
    liar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    for name, value in servers.s3_environment(liar.removesuffix("/cache")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cache_schema.storage.object_store._RETRY", {"max_retries": 0})
    folder = folder_at("s3://old/cache")
    with pytest.raises(CacheError, match=r"does not know a request that is needed here \(Conditional object PUTs are"):
        folder.write_new("manifest.json", b"{}")
    with pytest.raises(CacheUnreachable, match="is in another region than this is asked in; set AWS_REGION"):
        folder_at("s3://far/cache").write_new("manifest.json", b"{}")


def test_a_bucket_that_is_not_there_is_named_and_not_asked_for_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in servers.s3_environment().items():
        monkeypatch.setenv(name, value)
    folder = folder_at("s3://nowhere/cache")
    for use in (lambda: folder.write("a", b""), folder.names, lambda: list(folder.walk())):
        with pytest.raises(CacheUnreachable, match="there is no bucket nowhere"):
            use()


@pytest.mark.parametrize("link", ["a/../../b", "%2e%2e/secret", "..%5Csecret", "a%5cb", "a%00b", "x%0ay"])
def test_a_listing_that_leads_out_of_its_folder_is_refused(liar: str, link: str) -> None:
    _Liar.listing = f'<html><a href="good">good</a><a href="{link}">bad</a></html>'
    with pytest.raises(CacheCorrupt, match="lists"):
        folder_at(liar).names()


def test_links_around_a_listing_are_no_files(liar: str) -> None:
    _Liar.listing = '<a href="?C=N">Name</a><a href="/">up</a><a href="https://example.org/x">x</a><a href="a">a</a>'
    assert folder_at(liar).names() == ["a"]


def test_no_more_is_taken_in_than_was_asked_for(liar: str) -> None:
    folder = folder_at(liar)
    assert len(folder.read_bounded("endless", 1000)) == 1000
    with pytest.raises(CacheCorrupt, match="larger than"):
        folder.read_bounded("huge", 1000)


def test_a_file_that_comes_drop_by_drop_is_given_up_at_the_deadline(liar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_CACHE_TIMEOUT", "0.3")
    with pytest.raises(CacheUnreachable, match="it took too long"):
        folder_at(liar).read_bounded("drip", 1000)


def test_a_redirect_to_what_is_no_address_is_refused_and_not_repeated(liar: str) -> None:
    with pytest.raises(CacheUnreachable, match="redirects to what is no address") as caught:
        folder_at(liar).size("astray")
    assert "abc" not in str(caught.value)


def test_a_netrc_file_holds_the_credentials_of_a_web_server(
    liar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = folder_at(liar)
    _client.cache_clear()
    try:
        with pytest.raises(CacheUnreachable, match=r"refuses access \(401\); ~/\.netrc can hold the credentials"):
            folder.size("private")
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login mia password secret\n")
        (tmp_path / ".netrc").chmod(0o600)
        _client.cache_clear()
        assert folder.size("private") == int("9" * 17)
        (tmp_path / ".netrc").write_text("machine")
        _client.cache_clear()
        with pytest.raises(CacheUnreachable, match=r"\.netrc cannot be read"):
            folder.size("private")
    finally:
        _client.cache_clear()


def test_a_redirect_is_followed_within_its_host_alone(tmp_path: object) -> None:
    url, files = servers.nginx()
    (files / "redirected").mkdir(exist_ok=True)
    (files / "redirected/a").write_bytes(b"here")
    assert folder_at(f"{url}/moved/redirected").read_bounded("a", 10) == b"here"
    with pytest.raises(CacheUnreachable, match="redirects to another host"):
        folder_at(f"{url}/away").read_bounded("a", 10)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("s3://key:secret@bucket/cache", "holds credentials"),
        ("https://mia@example.org/cache", "holds credentials"),
        ("https://example.org/cache?token=abc", "without \\?"),
        ("ftp://example.org/cache", "no kind of place"),
        ("sftp://example.org:data/cache", "cannot be read .*; write sftp://HOST/PATH"),
        ("http://[::1/cache", "cannot be read .*; write http://HOST/PATH"),
    ],
)
def test_urls_with_credentials_or_of_no_known_kind_are_refused_and_not_repeated(url: str, complaint: str) -> None:
    with pytest.raises(CacheError, match=complaint) as caught:
        folder_at(url)
    assert "secret" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_web_servers_are_only_read() -> None:
    folder = folder_at("https://example.org/cache")
    assert isinstance(folder, RemoteFolder)
    assert not folder.writable
    with pytest.raises(CacheStorageError, match="only read"):
        folder.write("a", b"")


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b\\c", "C:", "x\0"]), min_size=1, max_size=4))
def test_only_plain_relative_names_are_inside(parts: list[str]) -> None:
    assert is_inside("/".join(parts)) == all(part == "a" for part in parts) or "C:" in parts[1:]


def test_a_name_with_a_time_is_inside_and_a_drive_is_not() -> None:
    assert is_inside("2026-11-26T12:30:00/manifest.json")
    assert not is_inside("C:/manifest.json")
