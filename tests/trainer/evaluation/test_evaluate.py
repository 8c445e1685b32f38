import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from cache_schema import open_cache
from trainer.data.splits import select_split
from trainer.errors import TrainError
from trainer.evaluation import metrics
from trainer.evaluation.embed import open_test_split, refuse_untelling
from trainer.evaluation.evaluate import average_timesteps, evaluate_queries, evaluate_run
from trainer.evaluation.metrics import retrieval_scores
from trainer.evaluation.tables import format_scores, remark_on
from trainer.methods.trained import load_trained
from trainer.models.discriminant import Discriminant
from trainer.models.student import load_student
from trainer.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def run(cache, tiny_config, tmp_path):
    train(tiny_config(updates=2), cache, tmp_path / "run")
    return tmp_path / "run"


def test_the_auxiliary_scores_are_those_of_the_gim_on_the_test_rows_features(run, cache):
    scores, embeddings, test = evaluate_run(run, cache, CPU, load_trained)
    tokens = cache.read(test.split.rows.tolist(), tap="hidden", timesteps=[10, 22], view=0).decode()
    gim = load_trained(run, load_student(run), cache).eval().gim
    for name, masked in (("unmasked", False), ("masked", True)):
        expected = gim(embeddings["student"], tokens, masked)
        torch.testing.assert_close(embeddings[name], expected)
        assert scores["auxiliary"][name]["22"] == retrieval_scores(embeddings[name][:, 1], test.labels)


def test_the_frozen_features_are_scored_beside_what_is_made_of_them(run, cache):
    scores, _, test = evaluate_run(run, cache, CPU, load_trained)
    tokens = cache.read(test.split.rows.tolist(), tap="hidden", timesteps=[10, 22], view=0).decode().float()
    pooled = tokens.mean(2)
    assert scores["frozen"]["pooled"]["22"] == retrieval_scores(pooled[:, 1], test.labels)
    assert scores["frozen"]["pooled"]["mean"] == retrieval_scores(average_timesteps(pooled), test.labels)
    trained = select_split(cache, "train", need_features=True)
    theirs = cache.read(trained.rows.tolist(), tap="hidden", timesteps=[10, 22], view=0).decode().float().mean(2)
    head = Discriminant(2, pooled.shape[2], pooled.shape[2])
    head.fit([(theirs, torch.from_numpy(trained.labels))])
    linear = retrieval_scores(average_timesteps(head(pooled)), test.labels)
    assert scores["frozen"]["linear"]["mean"] == pytest.approx(linear)
    assert scores == evaluate_run(run, cache, CPU, load_trained)[0]
    assert "linear head on them, of the training classes" in format_scores(scores)


@pytest.mark.parametrize(("own", "said"), [(0.3, "warning: E_D"), (0.5, "note: E_D"), (0.7, None)])
def test_an_embedding_that_is_behind_the_features_it_reads_is_told(own, said):
    def at(recall):
        return {"mean": {"recall_at_1": recall}}

    scores = {"auxiliary": {"masked": at(own)}, "auxiliary_names": {"masked": "E_D"}, "made_of_teacher": "masked"}
    remark = remark_on({**scores, "frozen": {"pooled": at(0.4), "linear": at(0.6)}})
    assert remark is None if said is None else remark.startswith(said)
    assert remark_on(scores) is None


def test_the_students_queries_are_ranked_once_and_its_scores_are_their_means(run, cache, monkeypatch):
    ranked = []
    original = metrics.ranked_neighbours

    def counted(embeddings, *given):
        ranked.append(embeddings)
        return original(embeddings, *given)

    monkeypatch.setattr(metrics, "ranked_neighbours", counted)
    scores, embeddings, test, queries = evaluate_queries(run, cache, CPU, load_trained)
    assert sum(torch.equal(one, embeddings["student"]) for one in ranked) == 1
    assert scores["student"] == retrieval_scores(embeddings["student"], test.labels)
    for name, value in scores["student"].items():
        assert value == metrics.mean_score(torch.from_numpy(queries.values[name]))
    assert scores == evaluate_run(run, cache, CPU, load_trained)[0]


def test_timesteps_are_averaged_as_directions():
    injected = torch.tensor([[[10.0, 0.0], [0.0, 0.1]]])
    torch.testing.assert_close(F.normalize(average_timesteps(injected), dim=-1), torch.full((1, 2), 0.5**0.5))


def test_without_test_features_only_the_student_is_scored(make_cache, tiny_config, tmp_path):
    cache = make_cache(feature_splits=("train",))
    train(tiny_config(updates=1), cache, tmp_path / "run")
    scores = evaluate_run(tmp_path / "run", cache, CPU, load_trained)[0]
    assert scores["auxiliary"] is None
    assert len(format_scores(scores).splitlines()) == 2


@pytest.mark.parametrize("sample", ["test-10-1", "train-1-3"])
def test_features_that_are_not_finite_are_named_and_the_run_is_not_blamed(run, cache, break_features, tmp_path, sample):
    shutil.copytree(cache.root, tmp_path / "broken")
    broken = break_features(open_cache(tmp_path / "broken"), sample)
    with pytest.raises(TrainError) as caught:
        evaluate_run(run, broken, CPU, load_trained)
    assert str(caught.value).startswith(f"the cached features 'hidden' of sample '{sample}' are not finite; ")
    assert "--lr" not in str(caught.value)


def test_a_run_of_other_features_is_not_scored_with_them(run, make_cache):
    with pytest.raises(TrainError, match="does not fit tap hidden of this cache"):
        evaluate_run(run, make_cache(tokens=9), CPU, load_trained)


@pytest.mark.parametrize("file", ["student", "gim"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_are_named_by_file_and_tensor_and_give_no_score(run, cache, file, value):
    weights = load_file(run / f"{file}.safetensors")
    name = max(weights)
    weights[name].view(-1)[0] = value
    save_file(weights, run / f"{file}.safetensors")
    with pytest.raises(TrainError, match=rf"{file}\.safetensors: 1 of \d+ tensors are not finite, .* {name};"):
        evaluate_run(run, cache, CPU, load_trained)


def test_weights_that_cannot_be_read_are_named(run, cache):
    (run / "gim.safetensors").unlink()
    (run / "gim.safetensors").mkdir()
    with pytest.raises(TrainError, match=r"gim\.safetensors cannot be read"):
        evaluate_run(run, cache, CPU, load_trained)


@pytest.mark.parametrize("factor", [0.0, 1e38])
def test_a_student_that_tells_no_image_from_another_has_no_score(run, cache, factor):
    weights = load_file(run / "student.safetensors")
    save_file({name: value * factor for name, value in weights.items()}, run / "student.safetensors")
    complaint = "embeddings of the student are " + ("the same" if not factor else "not finite")
    with pytest.raises(TrainError, match=complaint):
        evaluate_run(run, cache, CPU, load_trained)


def test_a_few_equal_images_are_scored():
    embeddings = torch.randn(10, 2, 4, generator=torch.Generator().manual_seed(0))
    embeddings[:5] = embeddings[0]
    refuse_untelling(embeddings, "E")
    embeddings[5] = 3 * embeddings[0]
    with pytest.raises(TrainError, match="more than half of the 10 embeddings of E are the same"):
        refuse_untelling(embeddings, "E")


def test_a_split_that_is_not_there_is_named(cache):
    with pytest.raises(TrainError, match="no rows of split 'validation'"):
        open_test_split(cache, 24, split="validation")
