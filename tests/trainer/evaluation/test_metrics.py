import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.errors import TrainError
from trainer.evaluation import metrics
from trainer.evaluation.metrics import (
    map_at_r,
    mean_score,
    ranked_neighbours,
    recall_at_k,
    retrieval_scores,
    score_queries,
)


def brute_force_ranking(embeddings: torch.Tensor) -> list[list[int]]:
    """Cosine similarity pair by pair; ties to the lower index."""
    points = embeddings.double().numpy()
    units = [point / max(np.linalg.norm(point), 1e-12) for point in points]
    ranking = []
    for i, query in enumerate(units):
        others = [j for j in range(len(units)) if j != i]
        ranking.append(sorted(others, key=lambda j: (-round(np.dot(query, units[j]) * 2**30), j)))
    return ranking


def brute_force_recall(ranking: list[list[int]], labels: list[int], k: int) -> float:
    return sum(any(labels[j] == labels[i] for j in order[:k]) for i, order in enumerate(ranking)) / len(labels)


def brute_force_map_at_r(ranking: list[list[int]], labels: list[int]) -> float:
    scores = []
    for i, order in enumerate(ranking):
        r = labels.count(labels[i]) - 1
        if r == 0:
            continue
        relevant = [labels[j] == labels[i] for j in order[:r]]
        precision = [sum(relevant[: n + 1]) / (n + 1) for n in range(r)]
        scores.append(sum(p for p, hit in zip(precision, relevant, strict=True) if hit) / r)
    return sum(scores) / len(scores) if scores else 0.0


# Small integers give many exact ties, duplicates and zero vectors.
problems = st.integers(2, 14).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        st.integers(1, n + 2),
    )
)


@settings(max_examples=max(150, settings.default.max_examples))
@given(problems)
def test_metrics_equal_their_brute_force_definitions_whatever_the_chunk(problem):
    points, labels, chunk = problem
    embeddings = torch.tensor(points, dtype=torch.float32)
    ranking = brute_force_ranking(embeddings)
    found = torch.cat([at for _, at in ranked_neighbours(embeddings, len(labels) - 1, chunk)])
    assert found.tolist() == ranking
    recalls = recall_at_k(embeddings, torch.tensor(labels), (1, 2, 4, 8), chunk)
    for k, value in recalls.items():
        assert value == pytest.approx(brute_force_recall(ranking, labels, k))
    assert map_at_r(embeddings, torch.tensor(labels), chunk) == pytest.approx(brute_force_map_at_r(ranking, labels))


@pytest.fixture
def proposing(monkeypatch):
    """However few images there are, float32 proposes candidates, hardly more than are wanted."""
    monkeypatch.setattr(metrics, "WORTH", 1)
    monkeypatch.setattr(metrics, "SPARE", 1)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems, st.integers(1, 6), st.sampled_from([0.0, 1e-9, 1e-7, 1e-5, 1e-3]))
def test_what_float32_proposes_and_float64_orders_is_the_ranking_of_float64(proposing, problem, depth, apart):
    points, _, chunk = problem
    points = torch.tensor(points, dtype=torch.float32)
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(depth)) * apart
    embeddings = (points + noise) * 10 ** (3 * depth - 9)  # near ties, and any scale
    found = torch.cat([at for _, at in ranked_neighbours(embeddings, depth, chunk)])
    assert found.tolist() == [order[:depth] for order in brute_force_ranking(embeddings)]


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 0.0])
def test_among_many_images_the_ranking_is_that_of_all_similarities_in_float64(monkeypatch, spread):
    monkeypatch.setattr(metrics, "WORTH", 16)
    random = torch.Generator().manual_seed(1)
    embeddings = 1 + spread * torch.randn(1500, 48, generator=random)  # of collapsed networks, as well
    embeddings[700:800] = embeddings[:100]  # and exact ties
    expected = metrics._Exact(embeddings).nearest(torch.arange(1500), 20)
    assert (20 + metrics.SPARE) * metrics.WORTH <= 1500
    found = torch.cat([at for _, at in ranked_neighbours(embeddings, 20)])
    assert torch.equal(found, expected)


def test_lower_precisions_around_it_change_no_ranking(proposing):
    random = torch.Generator().manual_seed(1)
    embeddings = 1 + 1e-3 * torch.randn(200, 32, generator=random)
    expected = torch.cat([at for _, at in ranked_neighbours(embeddings, 5)])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.cat([at for _, at in ranked_neighbours(embeddings, 5)])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)


# In a process of its own: what the tests before it freed would hide what it takes.
LIMITED = """
import resource, sys, torch
from pathlib import Path
from trainer.evaluation import metrics
torch.set_num_threads(1)
embeddings = torch.randn(8000, 32, generator=torch.Generator().manual_seed(0))
labels = torch.arange(8000) // 40
metrics.score_queries(embeddings[:200], labels[:200])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 220 * 2**20,) * 2)
for metrics.WORTH in (16, 1000):
    scores, _ = metrics.score_queries(embeddings, labels)
    assert all(value.isfinite().all() for value in scores.values())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_similarities_are_never_in_memory_together():
    """All of them would be 256 MB in float32, 512 MB in float64."""
    subprocess.run([sys.executable, "-c", LIMITED], check=True)


def test_a_hand_made_ranking_gives_the_numbers_worked_out_by_hand():
    # Angles on the circle: the order of the others is known at a glance.
    angles = torch.tensor([0.0, 10.0, 30.0, 31.0]).deg2rad()
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [9.0], [2.0], [5.0]])
    labels = torch.tensor([0, 1, 0, 1])
    # Nearest first: 0 -> 1 2 3, 1 -> 0 2 3, 2 -> 3 1 0, 3 -> 2 1 0.
    assert recall_at_k(embeddings, labels, (1, 2, 3)) == {1: 0.0, 2: 0.5, 3: 1.0}
    assert map_at_r(embeddings, labels) == 0.0


def test_a_lone_image_is_a_miss_for_recall_and_left_out_of_map_at_r():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    assert recall_at_k(embeddings, labels, (1,)) == {1: pytest.approx(2 / 3)}
    assert map_at_r(embeddings, labels) == 1.0
    assert map_at_r(embeddings, torch.tensor([0, 1, 2])) == 0.0


def test_a_query_never_finds_itself_even_among_duplicates():
    for start, neighbours in ranked_neighbours(torch.ones(5, 3), depth=4, chunk=2):
        assert all(start + i not in found for i, found in enumerate(neighbours.tolist()))


def test_scores_carry_the_names_of_the_result_files():
    scores = retrieval_scores(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    assert list(scores) == ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_embeddings_that_are_not_finite_have_no_score(value):
    embeddings = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    embeddings[2, 1] = embeddings[7, 0] = value
    with pytest.raises(TrainError, match="2 of 10 embeddings are not finite"):
        retrieval_scores(embeddings, torch.arange(10) // 2)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_those_of_pytorch_metric_learning_with_ties_and_lone_images(seed):
    accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randint(-2, 3, (80, 4), generator=random).float()  # many ties, and vectors of nothing
    labels = torch.cat([torch.randint(12, (76,), generator=random), torch.arange(100, 104)])  # 4 lone images
    scores, _ = score_queries(embeddings, labels)

    def neighbours(query, k, reference, same):
        """The same ranking for both, for where distances are equal theirs is left to chance."""
        found = torch.cat([at for _, at in ranked_neighbours(embeddings, len(labels) - 1)])[:, :k]
        return torch.zeros(found.shape), found

    calculator = accuracy.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"), k="max_bin_count", knn_func=neighbours
    )
    theirs = calculator.get_accuracy(embeddings, labels)
    # They leave images without another of their class out of every score, we only where it is undefined.
    lone = (labels[:, None] == labels).sum(1) == 1
    assert theirs["precision_at_1"] == pytest.approx(float(scores["recall_at_1"][~lone].mean()))
    assert theirs["r_precision"] == pytest.approx(mean_score(scores["r_precision"]))
    assert theirs["mean_average_precision_at_r"] == pytest.approx(mean_score(scores["map_at_r"]))
    assert bool((scores["map_at_r"].isnan() == lone).all())
