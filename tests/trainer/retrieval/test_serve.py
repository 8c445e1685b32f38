"""The page of `dit-train serve`, by real requests to a real server: what it finds, and what it does not let through."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from trainer.errors import TrainError
from trainer.retrieval.config import ServeConfig
from trainer.retrieval.index import open_index

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
serving = importlib.import_module("trainer.retrieval.serve")

_spec = importlib.util.spec_from_file_location("chromium", Path(__file__).with_name("chromium.py"))
assert _spec is not None
assert _spec.loader is not None
chromium = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chromium)

CONFIG = ServeConfig(port=0, top=4, max_upload_mb=0.2, max_megapixels=1, upload_seconds=0.3)


def opened(folder):
    index = open_index(folder)
    return serving.Served(index, index.model(), index.images())


@pytest.fixture(scope="module")
def url(indexes):
    """Where a server answers, of both students' indexes."""
    app = serving.make_app([opened(indexes[name]) for name in ("first", "second")], CONFIG)
    with serving.listen(CONFIG) as listening:
        server = serving.make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield serving.address_of(listening)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def query(pictures):
    return (pictures / "class 11" / "test-11-2.png").read_bytes()


def test_an_uploaded_image_finds_its_neighbours_by_every_student(client, indexes, query):
    said = client.post("search", content=query)
    assert said.status_code == 200
    results = said.json()["results"]
    assert [found["student"] for found in results] == ["first", "second"]
    for name, found in zip(("first", "second"), results, strict=True):
        index = open_index(indexes[name])
        expected = index.search(index.vectors[index.row_of("class 11/test-11-2.png")], 4)
        assert [hit["row"] for hit in found["hits"]] == [hit.row for hit in expected]
        assert found["hits"][0]["class"] == "class 11"
        assert [hit["distance"] for hit in found["hits"]] == pytest.approx(
            [1 - hit.similarity for hit in expected], abs=1e-5
        )
    assert str(indexes["first"].parent) not in said.text  # no place of this machine


def test_an_indexed_image_finds_others_in_every_index(client):
    said = client.get("neighbours/1/3").json()
    assert (said["query"], said["class"]) == ("class 10/test-10-3.png", "class 10")
    assert [len(found["hits"]) for found in said["results"]] == [4, 4]
    assert all(hit["row"] != 3 for found in said["results"] for hit in found["hits"])


def test_images_are_shown_by_their_row(client, pictures):
    said = client.get("images/0/7")
    assert said.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(said.content)) as shown:
        assert shown.size == (24, 24)


def test_health_names_what_is_served(client):
    assert client.get("health").json() == {
        "status": "ok",
        "indexes": [{"student": "first", "images": 10}, {"student": "second", "images": 10}],
    }


@pytest.mark.parametrize(
    "path",
    ["images/0/10", "images/2/0", "images/0/-1", "images/0/..%2f..%2fetc%2fpasswd", "images/0/test-10-0.png",
     "%2e%2e/%2e%2e/etc/passwd", "page/page.js", "neighbours/0/10", "neighbours/0/99999999999999999999", "index.html"],
)  # fmt: skip
def test_nothing_but_rows_of_an_index_is_served(client, path):
    said = client.get(path)
    assert said.status_code == 404
    assert set(said.json()) == {"error"}


def encoded(image, format_="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=format_)
    return buffer.getvalue()


def test_what_is_no_image_is_refused_with_a_reason(client, query):
    for data, reason in (
        (b"", "not an image of a known format"),
        (b"words", "not an image of a known format"),
        (query[: len(query) // 2], "not a whole image"),
        (encoded(Image.new("L", (1200, 900))), "1200 × 900 pixels are more than 1 megapixels"),
    ):
        said = client.post("search", content=data)
        assert said.status_code == 422
        assert reason in said.json()["error"]
    assert client.get("search").status_code == 405


def test_an_upload_over_the_limit_is_refused_whether_it_says_its_size_or_not(client):
    many = b"x" * 300_000
    stated = client.post("search", content=many)
    streamed = client.post("search", content=(many[start : start + 1000] for start in range(0, len(many), 1000)))
    for said in (stated, streamed):
        assert (said.status_code, said.json()) == (413, {"error": "the file is larger than 0.2 MB"})


def test_an_upload_that_never_ends_is_given_up(url):
    host, port = httpx.URL(url).host, httpx.URL(url).port
    with socket.create_connection((host, port), timeout=20) as connection:
        head = f"POST /search HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(f"{head}begun".encode())
        said = b"".join(iter(lambda: connection.recv(4096), b""))  # until the server hangs up
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"took too long to arrive" in said


def test_a_page_elsewhere_can_neither_read_nor_frame_nor_rename_it(client):
    assert client.get("health", headers={"Host": "elsewhere.example"}).status_code == 400
    for path in ("", "health", "images/0/0", "nowhere"):
        headers = client.get(path).headers
        assert "access-control-allow-origin" not in headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_an_image_that_is_gone_is_said_without_its_place(indexes, pictures, tmp_path, capsys):
    served = opened(indexes["first"])
    lost = serving.Served(served.index, served.model, served.index.images(str(tmp_path)))
    app = serving.make_app([lost, opened(indexes["second"])], CONFIG)
    with serving.listen(CONFIG) as listening:
        server = serving.make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        said = httpx.get(serving.address_of(listening) + "images/0/0")
        also = httpx.get(serving.address_of(listening) + "neighbours/0/0")  # of images that may be others
        server.should_exit = True
        thread.join()
    assert (said.status_code, also.status_code) == (404, 500)
    assert "cannot be answered" in also.json()["error"]
    assert str(tmp_path) not in said.text + also.text
    assert str(tmp_path) in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_in_one_line():
    with serving.listen(CONFIG) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(
            TrainError, match=rf"cannot listen on port {port} of 127.0.0.1: Address already in use; give"
        ):
            serving.listen(ServeConfig(port=port))


def test_ctrl_c_ends_the_command_with_success(indexes):
    command = [
        sys.executable,
        "-c",
        "from trainer.cli import main; main()",
        "serve",
        str(indexes["first"]),
        "--port",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    found = re.search(r"serving at (http://127\.0\.0\.1:\d+/); Ctrl-C ends it", lines[1])
    assert found, (lines, process.stderr)
    assert httpx.get(found[1] + "health").json()["status"] == "ok"
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors) == (0, "stopped\n", "")


def test_in_a_browser_a_dropped_image_shows_the_hits_of_both_students(url, tmp_path):
    if chromium.find_chromium() is None:
        pytest.skip("no chromium here: apt-get install chromium")
    browser = chromium.Chromium(tmp_path / "profile")
    try:
        browser.open(url)
        browser.wait_for("document.querySelector('#about')?.textContent.includes('second: 10 images')")
        browser.run("""(async () => {
            const image = await (await fetch("images/0/7")).blob();
            const carried = new DataTransfer();
            carried.items.add(new File([image], "dropped.jpg", {type: "image/jpeg"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true}));
        })()""")
        browser.wait_for("document.querySelectorAll('.card img').length == 8")
        browser.wait_for("[...document.querySelectorAll('.card img')].every(image => image.naturalWidth == 24)")
        assert browser.run("[...document.querySelectorAll('h2')].map(each => each.textContent)") == [
            "first 10 images",
            "second 10 images",
        ]
        assert browser.run("document.querySelector('.card span').textContent") == "1. class 11"
        browser.run("document.querySelector('.card').click()")
        browser.wait_for("document.querySelector('#status').textContent.startsWith('Nearest to class 11/')")
        assert browser.run("document.querySelectorAll('img.hit').length") > 0
        browser.run("""(() => {
            const carried = new DataTransfer();
            carried.items.add(new File(["words"], "words.txt"));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true}));
        })()""")
        browser.wait_for("document.querySelector('#status').textContent == 'not an image of a known format'")
        assert browser.run("document.querySelectorAll('.card').length") == 0
    finally:
        browser.close()
