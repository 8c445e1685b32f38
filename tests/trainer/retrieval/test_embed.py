"""Embeddings in a file are those of the evaluation, and no image is lost, computed twice, or left out unsaid."""

import shutil
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cache_schema import open_cache
from trainer.data.files import UnreadableImageError, class_of, decode_image, find_images
from trainer.errors import TrainError
from trainer.evaluation.evaluate import evaluate_run
from trainer.retrieval.embed import embed_images
from trainer.retrieval.embeddings import read_embeddings
from trainer.retrieval.images import CacheImages, FolderImages
from trainer.retrieval.model import Model, open_model


@pytest.fixture
def folder(pictures, tmp_path):
    """A copy of the pictures that a test may change."""
    return shutil.copytree(pictures, tmp_path / "images")


def embed_folder(folder, student, file, **options):
    return embed_images(FolderImages(folder, 80.0, threads=2), open_model(student), file, **options)


@pytest.mark.parametrize("student", ["first", "exported"])
def test_a_caches_embeddings_are_bit_for_bit_those_of_the_evaluation(student, students, cache_path, tmp_path):
    cache = open_cache(cache_path)
    _, expected, test = evaluate_run(students["first"], cache, torch.device("cpu"))
    embed_images(CacheImages(str(cache_path), cache, "test"), open_model(students[student]), tmp_path / "e.parquet")
    held = read_embeddings(tmp_path / "e.parquet")
    assert [entry.name for entry in held.entries] == cache.samples["id"].take(test.split.rows).to_pylist()
    assert held.entries[0].class_name == "class 10"
    np.testing.assert_array_equal(held.vectors, expected["student"].numpy())


def test_image_files_are_embedded_as_the_same_images_of_a_cache(students, pictures, cache, tmp_path):
    _, expected, test = evaluate_run(students["exported"], cache, torch.device("cpu"))
    ids = cache.samples["id"].take(test.split.rows).to_pylist()
    embed_folder(pictures, students["exported"], tmp_path / "e.parquet")
    held = read_embeddings(tmp_path / "e.parquet")
    assert [entry.name for entry in held.entries] == [f"class {name.split('-')[1]}/{name}.png" for name in sorted(ids)]
    order = np.argsort(ids)
    np.testing.assert_allclose(held.vectors, expected["student"].numpy()[order], atol=1e-5)


def test_a_run_and_its_export_are_one_student_and_two_runs_are_two(students):
    ids = {name: open_model(path).id for name, path in students.items()}
    assert ids["first"] == ids["exported"] != ids["second"]
    assert open_model(students["first"] / "student.safetensors").id == ids["first"]


def test_only_new_and_changed_images_are_embedded_again(students, folder, tmp_path):
    file = tmp_path / "e.parquet"
    assert embed_folder(folder, students["first"], file).fresh == 10
    before = read_embeddings(file)
    assert embed_folder(folder, students["first"], file).fresh == 0
    changed = folder / "class 10" / "test-10-0.png"
    Image.new("RGB", (30, 20), "red").save(changed)
    shutil.copy(changed, folder / "new.png")
    (folder / "class 11" / "test-11-4.png").unlink()
    done = embed_folder(folder, students["first"], file)
    assert (done.images, done.fresh) == (10, 2)
    after = read_embeddings(file)
    assert [entry.name for entry in after.entries] == find_images(folder)
    np.testing.assert_array_equal(after.vectors[1:-1], before.vectors[1:-1])
    np.testing.assert_allclose(after.vectors[0], after.vectors[-1], atol=1e-6)
    assert after.entries[-1].class_name == ""


def test_what_an_interruption_left_is_not_computed_again(students, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.retrieval.embed.BATCH", 3)
    monkeypatch.setattr("trainer.retrieval.embed.PART", 1)
    monkeypatch.setattr("trainer.retrieval.embed.ROWS", 4)
    whole, file = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    embed_folder(folder, students["first"], whole)
    embed, calls = Model.embed, []

    def interrupted(self, pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(self, pictures)

    monkeypatch.setattr(Model, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_folder(folder, students["first"], file)
    assert not file.exists()
    assert embed_folder(folder, students["first"], file).fresh == 4
    assert sorted(path.name for path in tmp_path.glob("e.*")) == ["e.parquet"]
    np.testing.assert_array_equal(read_embeddings(file).vectors, read_embeddings(whole).vectors)


def test_a_file_is_read_by_row_groups_that_together_are_all_of_it(students, folder, tmp_path, monkeypatch):
    whole, file = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    embed_folder(folder, students["first"], whole)
    for name, value in {"BATCH": 3, "PART": 1, "ROWS": 4}.items():
        monkeypatch.setattr(f"trainer.retrieval.embed.{name}", value)
    embed_folder(folder, students["first"], file)
    held, all_at_once = read_embeddings(file), read_embeddings(whole)
    assert [len(block.vectors) for block in held.blocks()] == [4, 4, 2]
    assert [entry for block in held.blocks() for entry in block.entries] == held.entries == all_at_once.entries
    np.testing.assert_array_equal(held.vectors, all_at_once.vectors)
    assert [held.number_of(row) for row in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]


def test_thumbnails_are_what_the_student_saw_in_the_column_that_tools_read(students, folder, tmp_path):
    file = tmp_path / "e.parquet"
    assert embed_folder(folder, students["first"], file).fresh == 10
    vectors = read_embeddings(file).vectors
    assert embed_folder(folder, students["first"], file, thumbnails=16).fresh == 10  # there were none
    shutil.copy(folder / "class 10" / "test-10-0.png", folder / "new.png")
    assert embed_folder(folder, students["first"], file, thumbnails=16).fresh == 1
    table = pq.read_table(file)
    assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert [each["path"] for each in table["image"].to_pylist()] == table["name"].to_pylist() == find_images(folder)
    assert {Image.open(BytesIO(each["bytes"])).size for each in table["image"].to_pylist()} == {(16, 16)}
    np.testing.assert_array_equal(read_embeddings(file).vectors[:-1], vectors)
    embed_folder(folder, students["first"], file)
    assert "image" not in pq.read_table(file).column_names


def test_images_that_cannot_be_read_are_left_out_and_named(students, folder, tmp_path):
    good = (folder / "class 10" / "test-10-0.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("no image")
    (folder / "nowhere.jpg").symlink_to(tmp_path / "nothing")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep.png")
    done = embed_folder(folder, students["first"], tmp_path / "e.parquet")
    assert done.images == 10
    reasons = read_embeddings(tmp_path / "e.parquet").about["failed"]["images"]
    assert reasons == done.failed
    assert "not a whole image" in reasons["cut.png"]
    assert reasons["text.jpg"] == "not an image of a known format"
    assert reasons["nowhere.jpg"] == "cannot be read: No such file or directory"
    assert "more than 8 bits" in reasons["deep.png"]
    with pytest.raises(TrainError, match=r"cut.png: not a whole image"):
        embed_folder(folder, students["first"], tmp_path / "strict.parquet", strict=True)


def test_a_file_of_another_student_or_of_other_images_is_kept(students, folder, pictures, tmp_path):
    file = tmp_path / "e.parquet"
    embed_folder(folder, students["first"], file)
    with pytest.raises(TrainError, match="by another student; give another --output, or --overwrite"):
        embed_folder(folder, students["second"], file)
    with pytest.raises(TrainError, match="of other images"):
        embed_folder(pictures, students["first"], file)
    assert embed_folder(folder, students["second"], file, overwrite=True).fresh == 10


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(TrainError, match=r"holds no image \(.*\.jpg.*\); other files in it: 1"):
        find_images(tmp_path)
    with pytest.raises(TrainError, match="there is no folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(TrainError, match="is not a folder"):
        find_images(tmp_path / "notes.txt")
    (tmp_path / "linked").symlink_to("/")
    with pytest.raises(TrainError, match="a link to a folder, which is not followed"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jpg", ""), ("owl/a.jpg", "owl"), ("owl/x/a.jpg", "owl"), ("Test/owl/a.jpg", "owl"), ("test/a.jpg", "")],
)
def test_the_class_is_the_folder_below_the_root_or_below_a_part(name, expected):
    assert class_of(name) == expected


def encoded(image, **options):
    buffer = BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_an_image_is_turned_upright_and_its_transparency_is_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(Image.new("RGB", (40, 20)), format="JPEG", exif=exif)).size == (20, 40)
    clear = decode_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), format="PNG"))
    assert clear.getpixel((0, 0)) == (255, 255, 255)


def test_damaged_metadata_and_damaged_avifs_are_no_whole_images():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hi"
    turned = encoded(Image.new("RGB", (8, 4)), format="JPEG", exif=exif)
    with pytest.raises(UnreadableImageError, match="not a whole image"):
        decode_image(turned.replace(b"\x01\x0e", b"\x01\x1a", 1))  # a resolution that is a text
    avif, unreadable = encoded(Image.new("RGB", (16, 16), (1, 200, 3)), format="AVIF"), 0
    for at in range(0, len(avif), 4):
        try:
            decode_image(avif[:at] + bytes([avif[at] ^ 255]) + avif[at + 1 :])
        except UnreadableImageError:
            unreadable += 1
    assert unreadable


def test_an_image_of_too_many_pixels_is_refused_before_any_is_decoded():
    header = encoded(Image.new("L", (3000, 1000)), format="PNG")[:60]  # no pixels are in it
    with pytest.raises(UnreadableImageError, match="3000 × 1000 pixels are more than 2 megapixels"):
        decode_image(header, 2.0)


def test_damaged_and_foreign_files_of_embeddings_are_refused_in_one_line(students, folder, tmp_path):
    file = tmp_path / "e.parquet"
    embed_folder(folder, students["first"], file)
    data = file.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(TrainError, match="damaged or no file of embeddings") as said:
            read_embeddings(file)
        assert "\n" not in str(said.value)
    with pytest.raises(TrainError, match="there is no file of embeddings"):
        read_embeddings(tmp_path / "none.parquet")


def test_a_network_that_gives_no_numbers_embeds_nothing(students, folder, tmp_path):
    broken = shutil.copytree(students["first"], tmp_path / "broken")
    model = open_model(broken)
    with torch.no_grad():
        next(model.student.parameters()).fill_(torch.nan)
    with pytest.raises(TrainError, match="not finite"):
        embed_images(FolderImages(folder, 80.0), model, tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()


def test_where_student_and_images_are_is_kept_relative_to_the_file(students, folder, tmp_path):
    embed_folder(folder, students["first"], tmp_path / "out" / "e.parquet")
    about = read_embeddings(tmp_path / "out" / "e.parquet").about
    assert about["images"] == {"kind": "folder", "place": "../images"}
    assert (tmp_path / "out" / about["model"]["place"]).samefile(students["first"])
