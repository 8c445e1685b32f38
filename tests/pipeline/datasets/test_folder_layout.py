"""Folders as people, cameras and file servers leave them: split words, thumbnails, suffixes, names that look alike."""

import re
import unicodedata

import pytest
from cache_building import many_examples
from dataset_layouts import save_image, write_cars, write_cars_in_one_file, write_lines
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import DataOptions
from pipeline.datasets import DataError, DatasetOptionError, open_dataset
from pipeline.datasets.class_names import look_alike_key, plain_class_name
from pipeline.datasets.image_files import IMAGE_SUFFIXES
from pipeline.datasets.split_words import is_split_word
from pipeline.inputs.scan import scan_sample
from pipeline.opening import open_data

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


def write_images(root, *sources):
    for source in sources:
        save_image(root / source, format="PNG")
    return root


def splits(dataset):
    return {s.id: (s.split, s.class_name) for s in dataset.samples}


@pytest.mark.parametrize("parts", [("Train", "Test"), ("TRAINING", "testing"), ("train", "Test")])
def test_split_words_are_splits_in_any_case(tmp_path, parts):
    write_images(tmp_path, f"{parts[0]}/wren/1.png", f"{parts[1]}/gull/1.png", "Unlabelled/1.png")
    assert splits(open_dataset("folder", tmp_path)) == {
        f"{parts[0]}/wren/1.png": ("train", "wren"),
        f"{parts[1]}/gull/1.png": ("test", "gull"),
        "Unlabelled/1.png": ("unlabeled", ""),
    }


@pytest.mark.parametrize("word", ["val", "Valid", "VALIDATION", "dev", "eval", "Query", "gallery"])
def test_a_word_that_could_be_any_split_is_asked_about_unless_the_user_chose(tmp_path, word):
    write_images(tmp_path, f"{word}/wren/1.png", f"{word}/gull/1.png", "train/wren/2.png")
    with pytest.raises(DataError, match=rf"{word}: beside train/, is this a class or a split\? .*--train-ratio 0\.5"):
        open_dataset("folder", tmp_path)
    assert splits(open_dataset("folder", tmp_path, train_classes=["wren"])) == {
        f"{word}/wren/1.png": ("train", "wren"),
        f"{word}/gull/1.png": ("test", "gull"),
        "train/wren/2.png": ("train", "wren"),
    }


def test_no_split_word_becomes_a_class_unless_the_user_names_it(tmp_path):
    write_images(tmp_path, "Test/1.png", "query/1.png")
    with pytest.raises(DataError, match="query: is this a class or a split"):
        open_dataset("folder", tmp_path)
    assert splits(open_dataset("folder", tmp_path, train_classes=["query"])) == {
        "Test/1.png": ("test", "Test"), "query/1.png": ("train", "query"),
    }  # fmt: skip


def test_unlabeled_beside_classes_is_no_class(tmp_path):
    write_images(tmp_path, "a/1.png", "b/1.png", "unlabeled/1.png")
    assert splits(open_dataset("folder", tmp_path))["unlabeled/1.png"] == ("unlabeled", "")


def test_metadata_that_says_class_and_split_settles_what_a_folder_is(tmp_path):
    write_images(tmp_path, "query/1.png", "gallery/2.png")
    write_lines(tmp_path / "metadata.csv", ["file_name,split,label", "query/1.png,Train,a", "gallery/2.png,test,b"])
    assert splits(open_dataset("folder", tmp_path)) == {
        "query/1.png": ("train", "a"), "gallery/2.png": ("test", "b")
    }  # fmt: skip


@given(st.sampled_from(["train", "test", "val", "dev", "eval", "query", "gallery", "unlabeled"]), st.data())
def test_a_split_word_is_one_in_any_case(word, data):
    upper = data.draw(st.lists(st.booleans(), min_size=len(word), max_size=len(word)))
    assert is_split_word("".join(c.upper() if up else c for c, up in zip(word, upper, strict=True)))


PAIRS = [
    ("cars_train", "cars_test"), ("train_images", "test_images"), ("imagesTr", "imagesTs"), ("train2017", "val2017"),
    ("Train Set", "test set"), ("seen", "unseen"), ("train-256", "test-256"),
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_folders_whose_names_hold_split_words_are_no_classes_unless_the_user_names_them(tmp_path, pair):
    write_images(tmp_path, f"{pair[0]}/wren/1.png", f"{pair[1]}/gull/1.png", "other/finch/1.png")
    for options in ({}, {"train_ratio": 0.5}):
        with pytest.raises(DataError, match=r"are called like splits, not like classes; rename .*--train-classes"):
            open_dataset("folder", tmp_path, **options)
    assert len(open_dataset("folder", tmp_path, train_classes=[pair[0]]).samples) == 3


def test_a_class_may_have_a_split_word_in_its_name(tmp_path):
    write_images(tmp_path, "bullet train/1.png", "steam train/1.png", "test tube/1.png")
    assert len({name for _, name in splits(open_dataset("folder", tmp_path)).values()}) == 3


@pytest.mark.parametrize("inner", [("train", "test"), ("images", "images"), ("train_images", "test_images")])
def test_classes_one_folder_too_deep_in_every_split_are_not_one_class(tmp_path, inner):
    write_images(tmp_path, f"train/{inner[0]}/wren/1.png", f"train/{inner[0]}/tit/1.png", f"test/{inner[1]}/gull/1.png")
    with pytest.raises(DataError, match=r"one folder too deep; move what is in it up into .*/t"):
        open_dataset("folder", tmp_path)


def test_a_class_called_train_may_be_in_a_split(tmp_path):
    write_images(tmp_path, "train/train/1.png", "train/bus/1.png", "test/tram/1.png")
    assert splits(open_dataset("folder", tmp_path))["train/train/1.png"] == ("train", "train")


def test_one_class_alone_is_said_to_be_one(tmp_path):
    write_images(tmp_path, "train/images/1.png", "test/images/2.png")
    with pytest.raises(DataError, match="class 'images' is in t"):
        open_dataset("folder", tmp_path)
    with pytest.raises(DataError, match="has only one class, 'images'"):
        open_dataset("folder", tmp_path, train_ratio=0.5)


HOUSEKEEPING = [
    "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", ".Trash", "FOUND.000",
    "~snapshot",
]  # fmt: skip


@pytest.mark.parametrize("name", HOUSEKEEPING)
def test_what_file_servers_and_systems_keep_is_no_data_at_any_depth(tmp_path, name):
    write_images(tmp_path, "a/1.png", "b/1.png", f"{name}/1.png", f"a/{name}/1.png", f"a/deep/{name.upper()}/x/1.png")
    assert set(splits(open_dataset("folder", tmp_path))) == {"a/1.png", "b/1.png"}


def test_every_suffix_that_counts_is_one_that_pillow_reads():
    Image.init()
    registered = Image.registered_extensions()
    assert {suffix for suffix in IMAGE_SUFFIXES if registered.get(suffix) not in Image.OPEN} == set()
    assert {".jfif", ".jpe", ".avif", ".jp2"} <= IMAGE_SUFFIXES


def test_images_of_rarer_suffixes_are_found_and_other_files_are_counted_and_said_once(tmp_path):
    for name in "ab":
        for suffix, kind in [("jfif", "JPEG"), ("JPE", "JPEG"), ("jp2", "JPEG2000"), ("tga", "TGA")]:
            save_image(tmp_path / f"{name}/1.{suffix}", format=kind)
        for other in ("2.heic", "3.HEIC", "notes.txt", "LICENSE", "Thumbs.db", ".DS_Store"):
            (tmp_path / name / other).write_bytes(b"?")
    said = []
    folder = open_data(DataOptions("folder", tmp_path), said.append)
    assert len(folder.samples) == 8
    assert all(scan_sample(folder, s).ok for s in folder.samples)
    (line,) = said
    assert line.startswith("passed over 8 files that are no images by their suffix: 4 .heic, ")
    assert "2 .txt" in line
    assert "2 without a suffix" in line


def test_one_class_in_two_unicode_forms_is_one_class(tmp_path):
    write_images(tmp_path, f"{COMPOSED}/1.png", f"{DECOMPOSED}/2.png", " b/1.png", "b /2.png")
    assert {name for _, name in splits(open_dataset("folder", tmp_path)).values()} == {COMPOSED, "b"}
    by_name = open_dataset("folder", tmp_path, train_classes=[f" {DECOMPOSED} "])
    assert {name for split, name in splits(by_name).values() if split == "train"} == {COMPOSED}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (COMPOSED, DECOMPOSED), ("wren", "wren "), ("Wren", "wren"), ("sea gull", "Seagull"), ("sea_gull", "Sea gull"),
        ("blue-jay", "blue\u2011jay"), ("wren", "wr\u200ben"), ("\ufb01nch", "finch"),
    ],
)  # fmt: skip
def test_a_class_in_train_and_test_is_refused_however_its_name_is_written(tmp_path, train, test):
    write_images(tmp_path, f"train/{train}/1.png", f"test/{test}/2.png")
    with pytest.raises(DataError, match="test classes must be unseen"):
        open_dataset("folder", tmp_path)


def test_names_that_look_alike_in_one_split_are_said(tmp_path):
    write_images(tmp_path, "train/Wren/1.png", "train/wren/2.png", "test/gull/1.png")
    (line,) = open_dataset("folder", tmp_path).remarks
    assert "'Wren' (train: train/Wren/1.png) and 'wren' (train: train/wren/2.png)" in line


def test_the_user_may_write_the_name_of_a_class_in_another_case(tmp_path):
    write_images(tmp_path, "Wren/1.png", "gull/1.png", "Gull/1.png", "finch/1.png")
    assert ("train", "Wren") in splits(open_dataset("folder", tmp_path, train_classes=["wren"])).values()
    with pytest.raises(DatasetOptionError, match="no image of a class 'GULL'"):
        open_dataset("folder", tmp_path, train_classes=["GULL"])


@many_examples
@given(st.text(max_size=12))
def test_a_plain_class_name_is_plain_and_looks_like_what_it_was_made_of(text):
    plain = plain_class_name(text)
    assert plain_class_name(plain) == plain
    assert look_alike_key(plain) == look_alike_key(text) == look_alike_key(plain.upper().lower())


def test_a_flat_folder_is_told_that_it_has_no_class_folders(tmp_path):
    write_images(tmp_path, "1.png", "2.png")
    for options in ({}, {"train_ratio": 0.5}):
        with pytest.raises(DataError, match="has images but no class folders"):
            open_dataset("folder", tmp_path, **options)


def test_a_folder_given_one_level_too_high_is_told_the_right_one(tmp_path):
    write_images(tmp_path, "images/a/1.png", "images/b/1.png")
    with pytest.raises(DataError, match=r"has only one class, 'images'.* give --data .*/images$"):
        open_dataset("folder", tmp_path)


def test_a_super_class_is_a_word_without_its_final_dot(tmp_path):
    write_images(tmp_path, "a/1.png", "b/1.png")
    assert open_dataset("folder", tmp_path, superclass=" Beetle. ").superclass == "Beetle"
    for word in ("", " ", ".", "beetle. bug", "a..b"):
        with pytest.raises(DatasetOptionError, match=r"--superclass '.*': expected the word"):
            open_dataset("folder", tmp_path, superclass=word)


def test_archives_unpacked_too_deep_and_files_renamed_by_a_download_are_recognised(tmp_path):
    cars = write_cars(tmp_path / "cars")
    with pytest.raises(DataError, match=r"found no cars_train, but .*/cars/cars_train: give --data .*/cars;"):
        open_dataset("cars", tmp_path)
    labels = cars / "devkit/cars_test_annos_withlabels.mat"
    labels.rename(labels.with_name("cars_test_annos_withlabels (1).mat"))
    with pytest.raises(DataError, match=r"withlabels \(1\)\.mat' beside it: rename it to cars_test_annos_withlabels"):
        open_dataset("cars", cars)
    labels.with_name("cars_test_annos_withlabels (1).mat").rename(labels)
    (cars / "devkit/cars_meta.mat").rename(cars / "devkit/cars_meta (2).mat")
    with pytest.raises(DataError, match=r"'cars_meta \(2\)\.mat' beside it: rename it to cars_meta\.mat"):
        open_dataset("cars", cars)
    (cars / "devkit/cars_meta (2).mat").rename(cars / "devkit/cars_meta.mat")
    for path, name in [("devkit", "devkit (1)"), ("cars_test", "cars_test-2"), ("cars_train", "cars_train - Copy (3)")]:
        (cars / path).rename(cars / name)
        with pytest.raises(DataError, match=rf"{re.escape(repr(name))} beside it: rename it to {path};"):
            open_dataset("cars", cars)
        (cars / name).rename(cars / path)
    (cars / "cars_train").rename(cars / "inner")
    (cars / "cars_train").mkdir()
    (cars / "inner").rename(cars / "cars_train/cars_train")
    with pytest.raises(DataError, match=r"cars_train/cars_train lies one folder too deep"):
        open_dataset("cars", cars)
    one = write_cars_in_one_file(tmp_path / "one")
    (one / "cars_annos.mat").rename(one / "cars_annos (1).mat")
    with pytest.raises(DataError, match=r"'cars_annos \(1\)\.mat' beside it: rename it to cars_annos\.mat"):
        open_dataset("cars", one)


def test_a_folder_of_other_files_is_told_what_was_passed_over(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.heic").write_bytes(b"?")
    with pytest.raises(DataError, match=r"holds no image .*; passed over 2 files .*: 2 \.heic; convert"):
        open_dataset("folder", tmp_path)
