"""Tiny data sets in the exact layouts that the official archives unpack to."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (24, 16)


def save_image(path: Path, colour: Any = (10, 20, 30), mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, SIZE, colour).save(path, **options)
    return path


def write_lines(path: Path, lines: Sequence[str], end: str = "\n", encoding: str = "utf-8") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


# --- CUB-200-2011 ------------------------------------------------------------------------------------------------

CUB_IMAGES = [
    # image id, class id, file, box as the file has it
    (1, 1, "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg", "3.0 2.0 10.0 8.0"),
    (2, 100, "100.Brown_Pelican/Brown_Pelican_0122_94022.jpg", "0.0 0.0 24.0 16.0"),
    (3, 101, "101.White_Pelican/White_Pelican_0025_97604.jpg", "1.0 1.0 23.0 15.0"),
    (4, 200, "200.Common_Yellowthroat/Common_Yellowthroat_0003_190521.jpg", "5.5 4.25 6.0 7.5"),
]
CUB_NAMES = {1: "001.Black_footed_Albatross", 100: "100.Brown_Pelican", 101: "101.White_Pelican",
             200: "200.Common_Yellowthroat"}  # fmt: skip


def write_cub(root: Path) -> Path:
    """CUB-200-2011: 200 classes, of which four have an image each; ids from 1, boxes x y width height as floats."""
    for _, _, file, _ in CUB_IMAGES:
        save_image(root / "images" / file)
    write_lines(root / "classes.txt", [f"{k} {CUB_NAMES.get(k, f'{k:03d}.Bird_{k}')}" for k in range(1, 201)])
    write_lines(root / "images.txt", [f"{i} {file}" for i, _, file, _ in CUB_IMAGES])
    write_lines(root / "image_class_labels.txt", [f"{i} {k}" for i, k, _, _ in CUB_IMAGES])
    write_lines(root / "bounding_boxes.txt", [f"{i} {box}" for i, _, _, box in CUB_IMAGES])
    write_lines(root / "train_test_split.txt", [f"{i} {i % 2}" for i, _, _, _ in CUB_IMAGES])
    return root


# --- NABirds -----------------------------------------------------------------------------------------------------

NABIRDS_CLASSES = {
    0: "Birds",
    1: "Ducks, Geese, and Swans",
    295: "Common Eider (Adult male)",
    297: "Common Eider (Female/juvenile)",
    313: "Chuck-will's-widow",
    746: "Dark-eyed Junco (White-winged)",
    817: "Oak Titmouse",
    1010: "Eurasian Collared-Dove",
}
NABIRDS_LABELLED = (817, 295, 313, 1010, 295, 746)


def nabirds_id(number: int) -> str:
    return str(uuid.UUID(int=number * 0x1234567890ABCDEF1234567))


def write_nabirds(root: Path) -> Path:
    """NABirds: UUIDs, class ids with gaps, inner nodes of the hierarchy and a leaf without images."""
    ids = [nabirds_id(n) for n in range(1, len(NABIRDS_LABELLED) + 1)]
    files = [f"{k:04d}/{i.replace('-', '')}.jpg" for i, k in zip(ids, NABIRDS_LABELLED, strict=True)]
    for file in files:
        save_image(root / "images" / file)
    write_lines(root / "classes.txt", [f"{k} {name}" for k, name in NABIRDS_CLASSES.items()])
    write_lines(root / "hierarchy.txt", ["1 0", "295 1", "297 1", "313 0", "746 0", "817 0", "1010 0"])
    write_lines(root / "images.txt", [f"{i} {file}" for i, file in zip(ids, files, strict=True)])
    write_lines(root / "image_class_labels.txt", [f"{i} {k}" for i, k in zip(ids, NABIRDS_LABELLED, strict=True)])
    write_lines(root / "bounding_boxes.txt", [f"{i} 3 2 10 8" for i in ids])
    write_lines(root / "sizes.txt", [f"{i} {SIZE[0]} {SIZE[1]}" for i in ids])
    write_lines(root / "photographers.txt", [f"{i} José Núñez" for i in ids], encoding="latin-1")
    write_lines(root / "train_test_split.txt", [f"{i} 1" for i in ids])
    return root


# --- Stanford Dogs -----------------------------------------------------------------------------------------------

DOGS = {
    1: "n02085620-Chihuahua",
    60: "n02096437-Dandie_Dinmont",
    61: "n02096585-Boston_bull",
    120: "n02116738-African_hunting_dog",
}


def dog_annotation(*boxes: tuple[float, float, float, float]) -> str:
    """An annotation as ImageNet wrote them, with its well-known placeholder for the file name."""
    objects = "".join(
        "\t<object>\n\t\t<name>dog</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
        "\t\t<difficult>0</difficult>\n\t\t<bndbox>\n"
        f"\t\t\t<xmin>{b[0]}</xmin>\n\t\t\t<ymin>{b[1]}</ymin>\n\t\t\t<xmax>{b[2]}</xmax>\n\t\t\t<ymax>{b[3]}</ymax>\n"
        "\t\t</bndbox>\n\t</object>\n"
        for b in boxes
    )
    return (
        "<annotation>\n\t<folder>%s</folder>\n\t<filename>%s</filename>\n\t<source>\n"
        "\t\t<database>ImageNet database</database>\n\t</source>\n\t<size>\n\t\t<width>24</width>\n"
        f"\t\t<height>16</height>\n\t\t<depth>3</depth>\n\t</size>\n\t<segment>0</segment>\n{objects}</annotation>"
    )


def cells(values: Sequence[str]) -> np.ndarray:
    """A MATLAB cell array, one string per row."""
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def write_dog_list(path: Path, files: Sequence[str], labels: Sequence[float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    annotations = [file.removesuffix(".jpg") for file in files]
    savemat(
        path,
        {
            "file_list": cells(files),
            "annotation_list": cells(annotations),
            "labels": np.array(labels, dtype=np.uint8).reshape(-1, 1),
        },
    )
    return path


def write_dogs(root: Path, lists: bool = True) -> Path:
    """Stanford Dogs: Images/ and Annotation/ with the same 120 folders, four of them with an image."""
    files = {k: f"{folder}/{folder.split('-')[0]}_{k}.jpg" for k, folder in DOGS.items()}
    for k in range(1, 121):
        (root / "Images" / DOGS.get(k, _between(k))).mkdir(parents=True)
    for file in files.values():
        save_image(root / "Images" / file)
        annotation = root / "Annotation" / file.removesuffix(".jpg")
        annotation.parent.mkdir(parents=True)
        annotation.write_text(dog_annotation((2, 3, 20, 14)))
    if lists:
        write_dog_list(root / "lists/train_list.mat", [files[1], files[61]], [1, 61])
        write_dog_list(root / "lists/test_list.mat", [files[60], files[120]], [60, 120])
    return root


def _between(k: int) -> str:
    """A folder name that sorts where class k belongs."""
    low, high = (2085620, 2096437) if k < 60 else (2096585, 2116738)
    return f"n{low + (k if k < 60 else k - 60):08d}-breed_{k}" if low + 120 < high else ""


# --- Stanford Cars -----------------------------------------------------------------------------------------------


def write_annotations(path: Path, rows: Sequence[Mapping[str, Any]], **others: Any) -> Path:
    """A MATLAB file with a 1 × N structure array `annotations` that has the fields of the rows."""
    table = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            table[0, i][name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"annotations": table, **others})
    return path


def car(label: Any, name: str, box: Sequence[Any] = (1, 1, 24, 16)) -> dict[str, Any]:
    return dict(zip(["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"], [*box, label, name], strict=True))


def car_names() -> np.ndarray:
    return np.array([[f"Make {i}" for i in range(1, 197)]], dtype=object)


def write_cars(root: Path, test_half: bool = True) -> Path:
    """Stanford Cars: 196 names, classes and boxes counted from 1, two halves."""
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": car_names()})
    halves = {"cars_train": [1, 98, 99, 196]} | ({"cars_test": [1, 120]} if test_half else {})
    for folder, labels in halves.items():
        rows = []
        for i, label in enumerate(labels, start=1):
            rows.append(car(label, f"{i:05d}.jpg"))
            save_image(root / folder / f"{i:05d}.jpg", (label, 0, 0))
        name = "cars_train_annos.mat" if folder == "cars_train" else "cars_test_annos_withlabels.mat"
        write_annotations(root / "devkit" / name, rows)
    return root


def write_cars_in_one_file(root: Path) -> Path:
    """Stanford Cars as the second official archive has it: car_ims/ and cars_annos.mat."""
    rows = []
    for i, label in enumerate([1, 98, 99, 196], start=1):
        values = car(label, "")
        values.pop("fname")
        rows.append({"relative_im_path": f"car_ims/{i:06d}.jpg", **values, "test": i % 2})
        save_image(root / f"car_ims/{i:06d}.jpg")
    write_annotations(root / "cars_annos.mat", rows, class_names=car_names())
    return root
