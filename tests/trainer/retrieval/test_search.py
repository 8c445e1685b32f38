"""A search from the command line: lines, JSON, a page and a picture, and one line where it cannot be."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer import retrieval
from trainer.retrieval.gallery import Query, fitted, render_png


def test_the_whole_way_from_a_folder_to_a_page_of_hits(here, students, pictures, tmp_path):
    file, index = tmp_path / "e.parquet", tmp_path / "e.index"
    code, said, _ = here("embed", pictures, "--model", students["exported"], "--output", file)
    assert code == 0
    assert re.search(r"wrote 10 embeddings to \S+ \(10 computed now, \d+ images/s\)", said)
    assert said.splitlines()[-1] == f"next: dit-train index {file} --output {index}"
    code, said, _ = here("index", file, "--output", index)
    assert f"wrote {index}: 10 images by exported, exact" in said
    query = pictures / "class 11" / "test-11-2.png"
    page, picture = tmp_path / "hits.html", tmp_path / "hits.png"
    code, said, _ = here("search", query, "--index", index, "--top", 3, "--html", page, "--png", picture)
    assert code == 0
    assert re.search(r"\n +1 +1\.0000  class 11 +class 11/test-11-2\.png\n", said)
    html = page.read_text()
    assert html.count("<figure") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    with Image.open(picture) as drawn:
        assert drawn.width > 4 * 160


def test_students_side_by_side_as_json(here, indexes, pictures):
    query = next(pictures.rglob("test-*.png"))
    options = ["--index", indexes["first"], "--index", indexes["second"], "--top", 4, "--json"]
    code, said, _ = here("search", query, *options)
    assert code == 0
    found = json.loads(said)["results"]
    assert [each["student"] for each in found] == ["first", "second"]
    for each in found:
        assert [hit["rank"] for hit in each["hits"]] == [1, 2, 3, 4]
        assert each["hits"][0]["distance"] == pytest.approx(0, abs=1e-5)
        assert all(hit["distance"] == pytest.approx(1 - hit["similarity"]) for hit in each["hits"])


def test_an_indexed_image_finds_others_and_is_marked_by_its_class(here, indexes, tmp_path):
    name, page = "class 10/test-10-1.png", tmp_path / "page.html"
    code, said, _ = here("search", "--item", name, "--index", indexes["first"], "--top", 50, "--json", "--html", page)
    assert code == 0
    (found,) = json.loads(said)["results"]
    assert len(found["hits"]) == 9
    assert found["note"] == "there are 9 images to find"
    assert name not in [hit["name"] for hit in found["hits"]]
    assert (page.read_text().count('class="hit"'), page.read_text().count('class="miss"')) == (4, 5)


def test_a_line_break_in_a_name_is_drawn_in_one_line():
    def drawn(name, class_name):
        return render_png(Query(name, Image.new("RGB", (8, 8)), class_name), [], [])

    assert drawn("a\nb.png", "two\nlines") == drawn(r"a\nb.png", r"two\nlines")


def test_an_empty_result_says_why(here, indexes, tmp_path):
    page = tmp_path / "p.html"
    Image.new("RGB", (24, 24), "white").save(tmp_path / "white.png")
    options = ["--index", indexes["first"], "--min-similarity", 1, "--html", page, "--png", tmp_path / "p.png"]
    code, said, _ = here("search", tmp_path / "white.png", *options)
    assert code == 0
    assert re.search(r"no image is as similar as 1; the nearest, class 1\d/test-\S+, has -?0\.\d+", said)
    assert "no image is as similar as 1" in page.read_text()


@pytest.mark.parametrize(
    ("query", "options", "code", "message"),
    [
        ("text.jpg", [], 1, "text.jpg: not an image of a known format"),
        ("cut.png", [], 1, "cut.png: not a whole image"),
        ("none.png", [], 1, "cannot be read: No such file"),
        ("good.png", ["--model", "SECOND"], 1, "was made by another student"),
        ("good.png", ["--index", "."], 1, "there is no index in"),
        ("good.png", ["--top", "0"], 2, "--top"),
        ("good.png", ["--item", "x"], 2, "--item"),
        ("good.png", ["--model", "SECOND", "--model", "SECOND"], 2, "once for each"),
    ],
)
def test_what_cannot_be_searched_is_answered_in_one_line(
    here, indexes, students, pictures, tmp_path, monkeypatch, query, options, code, message
):
    monkeypatch.chdir(tmp_path)
    good = next(pictures.rglob("test-*.png")).read_bytes()
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_text("words")
    options = [str(students["second"]) if option == "SECOND" else option for option in options]
    found, _, errors = here("search", query, "--index", indexes["first"], *options)
    assert found == code
    assert message in re.sub(r"[│\s]+", " ", errors)
    if code == 1:
        assert errors.count("\n") == 1


def test_names_of_files_do_not_become_markup(here, students, pictures, tmp_path):
    folder = tmp_path / "images" / "<b>bold<b>"
    folder.mkdir(parents=True)
    name = "a&<img src=x>.png"
    (folder / name).write_bytes(next(pictures.rglob("test-*.png")).read_bytes())
    here("embed", tmp_path / "images", "--model", students["first"], "--output", tmp_path / "e.parquet")
    here("index", tmp_path / "e.parquet", "--output", tmp_path / "index")
    query, page = tmp_path / "<i>.png", tmp_path / "page.html"
    query.write_bytes((folder / name).read_bytes())
    assert here("search", query, "--index", tmp_path / "index", "--html", page)[0] == 0
    html = page.read_text()
    assert not re.search(r"<b>|<i>|<img src=x", html)
    assert "&lt;b&gt;bold" in html


def test_a_cache_is_embedded_and_its_images_are_shown(here, students, cache_path, tmp_path):
    file, index, picture = tmp_path / "e.parquet", tmp_path / "index", tmp_path / "hits.png"
    options = ["--model", students["first"], "--output", file]
    code, said, _ = here("embed", cache_path, "--split", "test", *options)
    assert code == 0
    assert "wrote 10 embeddings" in said
    here("index", file, "--output", index)
    code, said, _ = here("search", "--item", "test-10-3", "--index", index, "--top", 2, "--png", picture)
    assert code == 0
    with Image.open(io.BytesIO(picture.read_bytes())) as drawn:
        assert drawn.format == "PNG"
    assert "--threads is for image files" in here("embed", cache_path, "--threads", 2, *options)[2]
    assert "--split is for a cache" in here("embed", tmp_path, "--split", "test", *options)[2]
    assert "name one of train, test, unlabeled, all" in here("embed", cache_path, "--split", "x", *options)[2]


README = Path(retrieval.__file__).with_name("README.md")


def test_the_commands_of_the_readme_run_as_they_stand_there(here, students, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "photos")
    shutil.copytree(Path("photos") / "class 10", Path("photos") / "owl")
    next(Path("photos/owl").iterdir()).rename("photos/owl/07.jpg")
    for name, run in (("distill", "first"), ("baseline", "second")):
        shutil.copytree(students[run], Path("runs/cars") / name)
    shutil.copy(next(pictures.rglob("test-*.png")), "query.jpg")
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    commands = [shlex.split(line) for line in "".join(blocks).splitlines()]
    assert len(commands) > 4
    for program, *arguments in commands:
        assert program == "dit-train"
        if arguments[0] not in ("serve", "bench"):
            code, _, said = here(*arguments)
            assert code == 0, (arguments, said)
    assert Path("hits.html").stat().st_size > 1000
    assert Path("side-by-side.png").stat().st_size > 1000


@pytest.mark.property
@given(text=st.text(st.characters(exclude_characters="…"), min_size=5), room=st.integers(5, 40))
def test_a_name_that_is_too_long_keeps_its_beginning_and_its_end(text, room):
    shown = fitted(text, lambda shown: len(shown) <= room)
    assert len(shown) <= room
    if len(text) <= room:
        assert shown == text
    else:
        head, _, tail = shown.partition("…")
        assert head
        assert tail
        assert text.startswith(head)
        assert text.endswith(tail)
