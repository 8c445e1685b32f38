import base64
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.errors import TrainError
from trainer.methods.trained import load_trained
from trainer.models.student import load_student
from trainer.reports import embedding_map
from trainer.reports.attention import look
from trainer.reports.embedding_map import lay_out
from trainer.reports.figures import loss_figure, recall_curves
from trainer.reports.report import FinishedRun, format_runs, load_runs, measured_log, summarise, write_report
from trainer.training.loop import train

_spec = importlib.util.spec_from_file_location("chromium", Path(__file__).parent.parent / "retrieval" / "chromium.py")
assert _spec is not None
assert _spec.loader is not None
chromium = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chromium)
CPU = torch.device("cpu")


@pytest.fixture
def run(cache, tiny_config, tmp_path):
    train(tiny_config(updates=2), cache, tmp_path / "run")
    return tmp_path / "run"


def test_several_seeds_of_a_mode_are_summarised_by_mean_and_spread(run, cache):
    one = load_runs([run], cache, CPU)[0]

    def with_recall(value: float) -> FinishedRun:
        student = {**one.scores["student"], "recall_at_1": value}
        return FinishedRun(run, "run", one.config, one.result, {**one.scores, "student": student})

    summary = summarise([with_recall(0.4), with_recall(0.6)], "id", 1.0)
    assert summary["distill"]["recall_at_1"] == pytest.approx(0.5)
    assert summary["distill"]["standard_deviation"]["recall_at_1"] == pytest.approx(0.02**0.5)
    assert "baseline" not in summary


def test_each_run_has_lines_of_its_own_for_what_it_makes_of_the_teacher(run, cache):
    one = load_runs([run], cache, CPU)[0]

    def named(name: str, value: float, **said: object) -> FinishedRun:
        auxiliary = {"masked": {"mean": dict.fromkeys(one.scores["student"], value)}}
        return replace(one, name=name, scores={**one.scores, "auxiliary": auxiliary, **said})

    by_teacher = [named(name, 0.5, scored="masked") for name in ("c", "d")]
    lines = format_runs([named("a", 0.25), named("b", 0.75), *by_teacher]).splitlines()[1:]
    assert [line.split()[0].rstrip(",") for line in lines] == ["a", "with", "b", "with", "c", "its", "d", "its"]
    assert [line.split()[-1] for line in (lines[1], lines[3])] == ["25.0", "75.0"]


def test_the_curves_of_a_run_are_of_its_validation_classes_from_the_first_to_the_last_point(
    wide_cache, tiny_config, tmp_path
):
    folder = tmp_path / "run"
    train(tiny_config("validation_classes=0.4", "eval_every=1", "epochs=2"), wide_cache, folder)
    (one,) = load_runs([folder], wide_cache, CPU)
    test = {**one.scores, "student": {**one.scores["student"], "recall_at_1": 0.123}}
    log = measured_log(replace(one, scores=test))
    curves = recall_curves(record for record in log if "eval" in record)
    assert set(curves) == {"", "E_D, E_R unmasked", "E_D, E_R masked"}
    validation, updates = one.result["validation"], one.result["student_updates"]
    assert [update for update, _ in curves[""]] == [updates // 2, updates]
    assert curves[""][-1][1] == validation["student"]["recall_at_1"]
    assert curves["E_D, E_R masked"][-1][1] == validation["auxiliary"]["masked"]["mean"]["recall_at_1"]
    unfollowed = replace(one, result={key: value for key, value in one.result.items() if key != "validation"})
    assert len(measured_log(unfollowed)) == len(log) - 1


def test_a_report_refuses_runs_of_different_caches(run, make_cache):
    with pytest.raises(TrainError, match=r"was trained on cache \w{8}, not on tiny-"):
        load_runs([run], make_cache(per_class=6), CPU)


def look_of(run, cache):
    return look("run", load_trained(run, load_student(run), cache), cache, CPU)


def test_what_queries_look_at_is_drawn_with_how_widely_they_read(run, cache):
    (found,) = look_of(run, cache)
    assert found.readers == "queries of the GIM"
    assert found.figure.startswith("data:image/png;base64,")
    assert set(found.spread) == {10, 22}
    assert all(0 < share <= 1 for share in found.spread.values())
    assert 0 <= found.apart < 1


def test_what_looks_at_nothing_or_at_features_of_other_images_is_not_drawn(cache, tiny_config, tmp_path):
    for name, config in {
        "baseline": tiny_config(updates=1, mode="baseline"),
        "shuffled": tiny_config("shuffle_features=true", updates=1),
        "no queries": tiny_config("gim.bridge_layers=0", updates=1),
    }.items():
        train(config, cache, tmp_path / name)
        assert look_of(tmp_path / name, cache) == []


def test_two_clusters_stay_apart_on_the_map_and_it_says_how_many_neighbours_it_keeps():
    random = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[[0, 1]].repeat_interleave(20, 0)
    embeddings = centres + 0.05 * torch.randn(40, 8, generator=random)
    layout = lay_out(embeddings)
    first, second = layout.points[:20], layout.points[20:]
    between = np.linalg.norm(first.mean(0) - second.mean(0))
    assert between > max(np.linalg.norm(part - part.mean(0), axis=1).max() for part in (first, second))
    assert 0.5 < layout.kept <= 1
    flat = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]]), dim=-1)
    assert lay_out(flat).kept == 1  # two channels lose nothing
    assert lay_out(flat).method == "principal components"


def test_a_map_of_many_images_shows_whole_classes(monkeypatch):
    monkeypatch.setattr(embedding_map, "MOST", 12)
    labels = np.repeat(np.arange(8), 5)
    rows = embedding_map._some_classes(labels)
    assert len(rows) <= 15
    assert all((labels[rows] == label).sum() == 5 for label in set(labels[rows]))


def test_in_the_legend_two_model_years_of_a_long_name_stay_apart():
    names = [f"Chevrolet Silverado 1500 Classic Extended Cab {year}" for year in (2007, 2012)]
    short = [embedding_map._shortened(name) for name in names]
    assert short[0] != short[1]
    assert max(map(len, short)) <= 48


def test_the_page_is_whole_in_a_browser(run, cache, tiny_config, tmp_path):
    if chromium.find_chromium() is None:
        pytest.skip("no chromium here: apt-get install chromium")
    train(tiny_config(updates=1, mode="baseline"), cache, tmp_path / "baseline")
    write_report(load_runs([tmp_path / "baseline", run], cache, CPU), cache, tmp_path, CPU)
    browser = chromium.Chromium(tmp_path / "profile")
    try:
        browser.open((tmp_path / "report.html").as_uri())
        browser.wait_for("document.readyState === 'complete' && [...document.images].every(image => image.complete)")
        assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")
        assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        titles = browser.run("[...document.querySelectorAll('h2')].map(title => title.textContent)")
        text = browser.run("document.body.innerText")
    finally:
        browser.close()
    assert {"Cost", "Map of the embeddings", "What run looks at", "Retrieval gallery"} <= set(titles)
    assert "R@1 − the first run's" in text
    assert "0.00 GB" in text  # features read: the tiny ones of two updates
    assert "queries of the GIM" in text


@pytest.mark.parametrize(("panels", "lines"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_the_titles_of_curves_have_room_two_to_a_line(panels, lines):
    titles = {f"Regression of the teacher's features {i}": {f"part{i}": ""} for i in range(panels)}
    log = [{"update": update, "losses": {f"part{i}": 1.0 for i in range(panels)}} for update in (1, 2)]
    svg = base64.b64decode(loss_figure({"run": log}, titles).split(",")[1]).decode()
    assert float(re.search(r'height="([\d.]+)pt"', svg)[1]) == pytest.approx(lines * 3.2 * 72)
