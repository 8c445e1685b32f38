"""An index finds what is nearest, knows the student that made it, and says when it is not whole."""

import json
import shutil

import numpy as np
import pytest
import torch

from trainer.errors import TrainError
from trainer.evaluation.metrics import ranked_neighbours
from trainer.retrieval.config import IndexConfig
from trainer.retrieval.index import ABOUT, make_index, open_index


def embeddings_of(index):
    return index.parent / f"{index.name}.parquet"


def test_an_exact_index_ranks_as_the_evaluation(indexes):
    index = open_index(indexes["first"])
    expected = torch.cat([rows for _, rows in ranked_neighbours(torch.from_numpy(index.vectors.copy()), 9)])
    for row in range(len(index)):
        hits = index.search(index.vectors[row], 20, skip=row)
        assert [hit.row for hit in hits] == expected[row].tolist()
    assert index.search(index.vectors[4], 1)[0].name == index.names[4]


def test_a_graph_finds_the_same_among_few_and_says_how_often(indexes, tmp_path):
    pytest.importorskip("usearch")
    exact = open_index(indexes["first"])
    graph = make_index(embeddings_of(indexes["first"]), tmp_path / "graph", IndexConfig(kind="hnsw"))
    assert graph.about["graph"]["recall_at_10"] == 1.0
    for row in range(len(exact)):
        assert graph.search(exact.vectors[row], 5, skip=row) == exact.search(exact.vectors[row], 5, skip=row)


def test_without_usearch_only_a_graph_is_refused(indexes, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(TrainError, match=r"pip install 'dit-distill\[search\]', or give --kind exact"):
        make_index(embeddings_of(indexes["first"]), tmp_path / "index", IndexConfig(kind="hnsw"))
    assert not (tmp_path / "index").exists()
    make_index(embeddings_of(indexes["first"]), tmp_path / "index", IndexConfig())


def test_a_large_index_is_a_graph_unless_exact_is_asked_for(indexes, tmp_path, monkeypatch):
    pytest.importorskip("usearch")
    monkeypatch.setattr("trainer.retrieval.index.EXACT_UP_TO", 9)
    kinds = {
        kind: make_index(embeddings_of(indexes["first"]), tmp_path / kind, IndexConfig(kind=kind)).about["kind"]
        for kind in ("auto", "exact")
    }
    assert kinds == {"auto": "hnsw", "exact": "exact"}


def test_an_index_takes_its_own_student_wherever_it_is_and_no_other(indexes, students):
    index = open_index(indexes["first"])
    assert index.model().id == index.model(students["exported"]).id
    with pytest.raises(TrainError, match=r"was made by another student \(first, \w{8}\) than .*second"):
        index.model(students["second"])


def test_index_images_and_student_can_be_moved_together(tmp_path, students, pictures, indexes):
    home = tmp_path / "home"
    shutil.copytree(students["first"], home / "run")
    shutil.copytree(pictures, home / "images")
    about = json.loads((indexes["first"] / ABOUT).read_text())
    shutil.copytree(indexes["first"], home / "index")
    about["model"]["place"], about["images"]["place"] = "../run", "../images"
    (home / "index" / ABOUT).write_text(json.dumps(about))
    home.rename(tmp_path / "elsewhere")
    index = open_index(tmp_path / "elsewhere" / "index")
    assert index.model().path == tmp_path / "elsewhere" / "run"
    assert index.images().picture(index.names[0]).size == (24, 24)
    (tmp_path / "elsewhere" / "run").rename(tmp_path / "run")
    (tmp_path / "elsewhere" / "images").rename(tmp_path / "images")
    with pytest.raises(TrainError, match="any more; name it with --model"):
        index.model()
    with pytest.raises(TrainError, match="say where they are with --images"):
        index.images()
    assert index.model(tmp_path / "run").id == index.about["model"]["id"]
    assert index.images(str(tmp_path / "images")).picture(index.names[0]).size == (24, 24)


@pytest.mark.parametrize("name", ["vectors.npy", "items.parquet", "index.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone", "empty"])
def test_a_damaged_index_is_refused_in_one_line(indexes, tmp_path, name, how):
    folder = shutil.copytree(indexes["first"], tmp_path / "index")
    data = bytearray((folder / name).read_bytes())
    if how == "gone":
        (folder / name).unlink()
    else:
        data[3 if name == ABOUT else len(data) // 2] ^= 0x40
        (folder / name).write_bytes({"cut": data[: len(data) // 2], "changed": data, "empty": b""}[how])
    with pytest.raises(TrainError) as said:
        open_index(folder)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("hostile", ["../../secret.png", "/etc/secret.png"])
def test_a_name_that_leads_out_of_the_folder_reaches_no_file(indexes, pictures, hostile):
    (pictures.parent.parent / "secret.png").write_bytes(next(pictures.rglob("test-*.png")).read_bytes())
    images = open_index(indexes["first"]).images()
    with pytest.raises(TrainError, match="is no name of an image"):
        images.picture(hostile)


def test_an_index_replaces_only_an_index_and_only_when_told(indexes, tmp_path):
    file = embeddings_of(indexes["first"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match=r"it holds notes.txt"):
        make_index(file, tmp_path / "mine", IndexConfig(), overwrite=True)
    make_index(file, tmp_path / "index", IndexConfig())
    with pytest.raises(TrainError, match="holds an index already"):
        make_index(file, tmp_path / "index", IndexConfig())
    other = make_index(embeddings_of(indexes["second"]), tmp_path / "index", IndexConfig(), overwrite=True)
    assert other.label == "second"
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "index.json",
        "items.parquet",
        "vectors.npy",
    ]


def test_a_vector_of_another_width_is_not_compared(indexes):
    with pytest.raises(TrainError, match="holds vectors of 32 numbers"):
        open_index(indexes["first"]).search(np.zeros(7, np.float32), 3)
