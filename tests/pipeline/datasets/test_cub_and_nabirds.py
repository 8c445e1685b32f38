"""CUB-200-2011 and NABirds in their official layouts: open-set by class, and every error names file and line."""

import re
import shutil

import pytest
from cache_building import many_examples
from dataset_layouts import CUB_IMAGES, nabirds_id, save_image, write_cub, write_lines, write_nabirds
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets import DataError, open_dataset, split_counts
from pipeline.inputs.scan import scan_sample


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory):
    return write_cub(tmp_path_factory.mktemp("cub"))


def test_cub_is_split_by_class_whatever_its_official_split_says(cub_root):
    cub = open_dataset("cub", cub_root)
    assert [(s.id, s.split, s.label, s.class_name) for s in cub.samples] == [
        ("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18", "train", 0, "Black footed Albatross"),
        ("100.Brown_Pelican/Brown_Pelican_0122_94022", "train", 99, "Brown Pelican"),
        ("101.White_Pelican/White_Pelican_0025_97604", "test", 100, "White Pelican"),
        ("200.Common_Yellowthroat/Common_Yellowthroat_0003_190521", "test", 199, "Common Yellowthroat"),
    ]
    assert cub.superclass == "bird"
    assert cub.protocol.startswith("classes 1–100 train, classes 101–200 test")
    assert cub.read(cub.samples[2]) == (cub_root / cub.samples[2].source).read_bytes()


def test_cub_boxes_are_given_by_corner_and_size_with_fractions(cub_root):
    boxes = [s.box for s in open_dataset("cub", cub_root).samples]
    assert boxes == [(3.0, 2.0, 13.0, 10.0), (0.0, 0.0, 24.0, 16.0), (1.0, 1.0, 24.0, 16.0), (5.5, 4.25, 11.5, 11.75)]


def test_cub_needs_no_official_split_and_reads_windows_line_ends_marks_and_blank_lines(tmp_path):
    write_cub(tmp_path)
    (tmp_path / "train_test_split.txt").unlink()
    expected = open_dataset("cub", tmp_path).samples
    for name in ("images.txt", "image_class_labels.txt", "bounding_boxes.txt", "classes.txt"):
        data = (tmp_path / name).read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data + b"\r\n\r\n")
    assert open_dataset("cub", tmp_path).samples == expected


def test_the_limit_counts_images_of_each_split(cub_root):
    limited = open_dataset("cub", cub_root, limit=1)
    assert split_counts(limited.samples) == {"train": 1, "test": 1}
    assert limited.protocol.endswith("only the first 1 images of each split")


@pytest.mark.parametrize("name", ["images.txt", "image_class_labels.txt", "bounding_boxes.txt", "classes.txt"])
def test_a_missing_file_is_named_with_the_layout_and_its_source(tmp_path, name):
    (write_cub(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=rf"found no {name}; it must contain images/, .*caltech\.edu"):
        open_dataset("cub", tmp_path)


@pytest.mark.parametrize(
    ("name", "lines", "complaint"),
    [
        ("bounding_boxes.txt", "1 1.0 1.0 5.0", r" line 1: expected 5 fields \(image id x y width height\), found 4"),
        (
            "bounding_boxes.txt",
            "1 1 1 5 5|2 nan 1 5 5|3 1 1 5 5|4 1 1 5 5",
            r" line 2: 'nan' is not a number of pixels",
        ),
        ("bounding_boxes.txt", "1 1 1 5 5|2 1 1 5 five|3 1 1 5 5|4 1 1 5 5", r" line 2: 'five' is not a number of pix"),
        ("bounding_boxes.txt", "1 1 1 5 5", r": has no line for image id '2' \(.*images\.txt line 2\)"),
        ("bounding_boxes.txt", "1 1 1 5 5|9 1 1 5 5", r" line 2: image id '9' is not in images\.txt"),
        ("image_class_labels.txt", "1 201|2 1|3 1|4 1", r" line 1: class 201 is not in classes\.txt"),
        ("image_class_labels.txt", "1 1|2 -1|3 1|4 1", r" line 2: class id '-1' is not a whole number"),
        ("image_class_labels.txt", "1 1|2 ²|3 1|4 1", r" line 2: class id '²' is not a whole number"),
        ("image_class_labels.txt", "1 1|1 2", r" line 2: image id '1' is on line 1 already"),
        ("classes.txt", "1 a|201 b", r" line 2: class 201 is not in 1–200"),
        ("classes.txt", "1 a|01 b", r" line 2: class 1 is listed already"),
        ("images.txt", "1 ../secret.jpg|2 a.jpg|3 b.jpg|4 c.jpg", r" line 1: image path '\.\./secret\.jpg' leads out"),
        ("images.txt", "1 a.jpg|2 /etc/passwd|3 b.jpg|4 c.jpg", r" line 2: image path '/etc/passwd' leads out"),
        ("images.txt", "1 a.jpg|2 x/./a.jpg|3 b.jpg|4 x/a.jpg", r" line 4: 'x/a\.jpg' is on line 2 already"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, name, lines, complaint):
    path = write_lines(write_cub(tmp_path) / name, lines.split("|"))
    with pytest.raises(DataError, match=re.escape(str(path)) + complaint):
        open_dataset("cub", tmp_path)


@many_examples
@given(
    name=st.sampled_from(["images.txt", "image_class_labels.txt", "bounding_boxes.txt", "classes.txt"]),
    number=st.integers(0, 3),
    line=st.binary(max_size=40)
    | st.sampled_from([b"\xff\xfe1\0", b"\xfe\xff", b"\xef\xbb\xbf", b"\r"])
    | st.text(st.sampled_from("0123456789. -/\tae"), max_size=20).map(str.encode),
)
def test_a_garbled_line_gives_a_data_set_or_an_error_with_file_and_line(tmp_path, cub_root, name, number, line):
    root = tmp_path / "cub"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(cub_root, root, ignore=shutil.ignore_patterns("*.jpg"))
    lines = (root / name).read_bytes().split(b"\n")
    lines[number] = line
    (root / name).write_bytes(b"\n".join(lines))
    try:
        samples, complaint = open_dataset("cub", root).samples, None
    except DataError as error:
        samples, complaint = [], str(error)
    assert complaint is None or re.search(rf"{re.escape(str(root))}/\w+\.txt line \d+", complaint)
    assert [s.label < 100 for s in samples] == [s.split == "train" for s in samples]


def test_an_image_that_is_listed_but_not_there_is_set_aside_by_the_scan(tmp_path):
    (write_cub(tmp_path) / "images" / CUB_IMAGES[0][2]).unlink()
    cub = open_dataset("cub", tmp_path)
    assert [scan_sample(cub, s).ok for s in cub.samples] == [False, True, True, True]
    assert "No such file" in scan_sample(cub, cub.samples[0]).reason


def test_the_images_may_be_on_another_disk_but_no_single_image_may_be_a_link_elsewhere(tmp_path):
    root = write_cub(tmp_path / "cub")
    shutil.move(root / "images", tmp_path / "other disk")
    (root / "images").symlink_to(tmp_path / "other disk")
    secret = save_image(tmp_path / "private.jpg")
    (tmp_path / "other disk" / CUB_IMAGES[1][2]).unlink()
    (tmp_path / "other disk" / CUB_IMAGES[1][2]).symlink_to(secret)
    cub = open_dataset("cub", root)
    scanned = [scan_sample(cub, s) for s in cub.samples]
    assert [s.ok for s in scanned] == [True, False, True, True]
    assert "a link that leaves the data set's folder" in scanned[1].reason


# --- NABirds -----------------------------------------------------------------------------------------------------


def test_nabirds_is_split_in_the_middle_of_its_classes_with_images(tmp_path):
    birds = open_dataset("nabirds", write_nabirds(tmp_path))
    # In id order 295, 313, 746 | 817, 1010: the middle one trains. 297 has no image, 0 and 1 are inner nodes.
    assert [(s.id, s.split, s.label, s.class_name) for s in birds.samples] == [
        (nabirds_id(1), "test", 3, "Oak Titmouse"),
        (nabirds_id(2), "train", 0, "Common Eider (Adult male)"),
        (nabirds_id(3), "train", 1, "Chuck-will's-widow"),
        (nabirds_id(4), "test", 4, "Eurasian Collared-Dove"),
        (nabirds_id(5), "train", 0, "Common Eider (Adult male)"),
        (nabirds_id(6), "train", 2, "Dark-eyed Junco (White-winged)"),
    ]
    assert birds.protocol.startswith("the 5 classes with images in the order of their ids: the first 3 train")
    assert birds.samples[0].box == (3.0, 2.0, 13.0, 10.0)
    assert all(scan_sample(birds, s).ok for s in birds.samples)


def test_the_border_between_the_halves_does_not_move_with_images_that_are_missing_on_disk(tmp_path):
    whole = open_dataset("nabirds", write_nabirds(tmp_path)).samples
    shutil.rmtree(tmp_path / "images/0295")
    assert open_dataset("nabirds", tmp_path).samples == whole


def test_nabirds_needs_only_the_files_it_reads(tmp_path):
    write_nabirds(tmp_path)
    for name in ("hierarchy", "sizes", "photographers", "train_test_split"):
        (tmp_path / f"{name}.txt").unlink()
    assert len(open_dataset("nabirds", tmp_path).samples) == 6


def test_a_latin_1_class_name_keeps_its_letters(tmp_path):
    write_nabirds(tmp_path)
    write_lines(tmp_path / "classes.txt", [f"{k} Añil (niño)" for k in (295, 313, 746, 817, 1010)], encoding="latin-1")
    assert {s.class_name for s in open_dataset("nabirds", tmp_path).samples} == {"Añil (niño)"}


def test_an_unknown_class_of_nabirds_is_named_with_its_line(tmp_path):
    write_nabirds(tmp_path)
    labels = (tmp_path / "image_class_labels.txt").read_text().replace(" 746", " 747")
    (tmp_path / "image_class_labels.txt").write_text(labels)
    with pytest.raises(DataError, match=r"image_class_labels\.txt line 6: class 747 is not in classes\.txt"):
        open_dataset("nabirds", tmp_path)
