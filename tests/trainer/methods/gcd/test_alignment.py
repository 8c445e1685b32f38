import pytest
import torch
import torch.nn.functional as F

from trainer.data.batches import TrainingBatches
from trainer.errors import TrainError
from trainer.evaluation.evaluate import evaluate_run
from trainer.methods.gcd.alignment import gradient_alpha
from trainer.methods.gcd.method import OTHER_VIEW
from trainer.methods.reading import TEACHER
from trainer.methods.registry import find_method
from trainer.methods.trained import load_trained
from trainer.models.student import build_student, load_student
from trainer.runs import read_metrics
from trainer.training.assembly import assemble
from trainer.training.loop import train

CPU = torch.device("cpu")
BOTH = ("loss.drc_on=both", "loss.stop_gradient=true", "loss.cal_target=masked", "loss.cal=normalized")
# Everything that is measured before the first update, or remembered from one to the next.
STATEFUL = (
    *BOTH, "gim.residual=pca", "gim.token_norm=whiten", "gim.token_dropout=0.5", "gim.drop_path=0.2",
    "gim.mask_student=0.5", "gim.width=16", "gim.heads=2", "loss.share_proxies=false", "loss.align=memory",
    "loss.memory=7", "loss.center=class", "loss.target_views=mean", "loss.alpha_by=gradient_ratio",
    "unlabeled_per_batch=1", "optim.ema=0.5",
)  # fmt: skip


@pytest.fixture
def build(cache, tiny_config):
    def make(*settings):
        config = tiny_config(*settings)
        torch.manual_seed(config.seed)
        kind = find_method(config.method)
        batches = TrainingBatches(cache, config, 24, kind.needs(config))
        shapes = {name: source.shape for name, source in batches.sources.items()}
        method = kind(config, build_student(config.student), batches.classes, shapes)
        method.fit(batches.fitting(2))
        return method.train(), batches[0].to(CPU)

    return make


def weights(run):
    return {file.name: file.read_bytes() for file in sorted(run.glob("*.safetensors"))}


@pytest.mark.parametrize("align", ["direct", "projector", "relational", "memory"])
@pytest.mark.parametrize("target", ["ed", "pooled"])
@pytest.mark.parametrize("center", ["none", "class"])
def test_every_alignment_teaches_the_student_and_leaves_the_teachers_side_alone(build, align, target, center):
    settings = ("loss.target_components=5", f"loss.center={center}", f"loss.align_target={target}")
    method, batch = build(*BOTH, f"loss.align={align}", *settings, "unlabeled_per_batch=2")
    loss = method(batch)["cal"]
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in method.student.parameters())
    assert all(p.grad is None or not p.grad.any() for p in method.gim.parameters())


def test_the_gim_has_a_width_of_its_own(build):
    method, batch = build("gim.width=16", "gim.heads=2")
    assert method.gim.queries.shape[1] == 16
    assert method.drc.proxies.shape[1] == 32  # E_D of the student's width, which CAL compares
    method, batch = build("gim.width=16", "gim.heads=2", "loss.align=relational")
    assert method.drc.proxies.shape[1] == 16
    assert method(batch)["loss"].isfinite()


def test_at_the_start_a_residual_is_the_pooled_tokens_components_and_nothing_of_the_gim(build):
    method, batch = build(*BOTH, "gim.residual=pca", "loss.align_target=pooled")
    found = method.auxiliary(method.student(batch.images), batch.features)
    pooled = method.pooled(batch.features[TEACHER].mean(2, keepdim=True)).squeeze(2)
    torch.testing.assert_close(found["masked"], pooled, atol=1e-5, rtol=1e-5)
    assert pooled.any()
    method(batch)["loss"].backward()
    assert method.gim.shortcut.gate.grad.abs() > 0
    assert method.gim.shortcut.weight.grad.any()


def test_a_discriminant_is_the_linear_head_of_the_training_classes_and_is_not_trained(build):
    method, batch = build("gim.residual=discriminant", "gim.width=16", "gim.heads=2", "loss.align=projector")
    found = method.auxiliary(method.student(batch.images), batch.features)
    shortcut = method.gim.shortcut
    pooled = batch.features[TEACHER].float().mean(2)
    expected = torch.einsum("bpc,pck->bpk", pooled - shortcut.mean[:, 0], shortcut.weight)
    torch.testing.assert_close(found["masked"], expected, atol=1e-5, rtol=1e-5)
    assert expected.any()
    method(batch)["loss"].backward()
    assert shortcut.gate.grad.abs() > 0
    assert "gim.shortcut.weight" in method.state_dict()
    assert "gim.shortcut.weight" not in dict(method.named_parameters())


def test_a_run_of_a_discriminant_is_read_again_as_it_was(cache, tiny_config, tmp_path):
    settings = ("gim.residual=discriminant", "gim.token_norm=whiten", "gim.token_dropout=0.5", "updates=2")
    train(tiny_config(*settings), cache, tmp_path / "run")
    scores = evaluate_run(tmp_path / "run", cache, CPU, load_trained)[0]
    assert scores["auxiliary"]["masked"]["mean"]["recall_at_1"] >= 0
    weight = load_trained(tmp_path / "run", load_student(tmp_path / "run"), cache).gim.shortcut.weight
    assert weight.any()


def test_what_a_method_measures_is_every_row_in_every_view_and_none_that_is_held_out(cache, wide_cache, tiny_config):
    config = tiny_config("gim.residual=pca", "validation_classes=0.4", "batch_size=4")
    batches = TrainingBatches(wide_cache, config, 24, find_method("gcd").needs(config))
    read = [batch.features[TEACHER][:, 0, 0, :2].long() for batch in batches.fitting(2)]
    seen = sorted(map(tuple, torch.cat(read).tolist()))
    assert seen == sorted((row, view) for row in batches.label_of for view in (0, 1))
    assert not {row for row, _ in seen} & set(batches.validation.rows.tolist())


def test_the_mean_over_views_is_of_the_image_and_of_its_mirror_image(build):
    method, batch = build(*BOTH, "loss.target_views=mean", "loss.align_target=pooled", "loss.align=relational")
    own, other = batch.features[TEACHER], batch.features[OTHER_VIEW]
    assert torch.equal(own[..., 0], other[..., 0])  # the same rows
    assert torch.equal(own[..., 1], 1 - other[..., 1])  # in the other view
    a, b = (method.pooled(view.mean(2, keepdim=True)).squeeze(2) for view in (own, other))
    student = method.student(batch.images)
    target = (F.normalize(a, dim=-1) + F.normalize(b, dim=-1)) / 2
    torch.testing.assert_close(method(batch)["cal"], method.alignment(student, target, batch.labels))


def test_a_cache_with_one_view_has_no_mean_over_views(make_cache, tiny_config):
    config = tiny_config("loss.target_views=mean")
    with pytest.raises(TrainError, match="one view to train on, canonical"):
        TrainingBatches(make_cache(views=("canonical",)), config, 24, find_method("gcd").needs(config))


def test_alpha_by_gradient_ratio_makes_the_gradients_at_the_student_as_long_as_asked():
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    task, alignment = student.square().sum(), (7 * student).sin().sum()
    alpha = gradient_alpha(task, alignment, student, ratio=0.5)
    (of_task,) = torch.autograd.grad(task, student, retain_graph=True)
    (of_alignment,) = torch.autograd.grad(alpha * alignment, student)
    torch.testing.assert_close(of_alignment.norm(), 0.5 * of_task.norm())
    assert gradient_alpha(task, student.sum() * 0, student, 1.0).isfinite()


def test_alpha_by_gradient_ratio_is_logged_and_used(build):
    method, batch = build(*BOTH, "loss.alpha_by=gradient_ratio", "loss.alpha_ratio=0.3")
    losses = method(batch)
    torch.testing.assert_close(losses["loss"], losses["drc"] + losses["drc_student"] + losses["alpha"] * losses["cal"])
    assert losses["alpha"] > 0


def test_a_gate_is_open_only_while_the_teachers_side_is_ahead_on_validation_classes(wide_cache, tiny_config, tmp_path):
    config = tiny_config(*BOTH, "loss.alpha_gate=validation", "validation_classes=0.4", "eval_every=1", "epochs=4")
    train(config, wide_cache, tmp_path / "run")
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected = 0.0
    for record in log:
        if "eval" in record:
            scores = record["eval"]
            masked = scores["auxiliary"]["masked"]["mean"]["recall_at_1"]
            expected = float(masked > scores["student"]["recall_at_1"])
        else:
            assert record["losses"]["alpha"] == expected
    assert sum("eval" in record for record in log) == 3


@pytest.fixture(scope="module")
def blind_cache(build_tiny, tmp_path_factory):
    """Five training classes whose pictures are alike, and whose features are not."""
    classes = {"train": (0, 200, 400, 600, 800), "test": (1000, 1200)}
    return build_tiny(tmp_path_factory.mktemp("blind") / "cache", classes=classes)


GATED = (*BOTH, "loss.alpha_gate=validation", "validation_classes=0.4", "eval_every=1", "loss.alpha=3")


def test_a_gate_opens_where_the_teachers_side_is_ahead_and_is_as_it_was_after_a_resume(
    blind_cache, tiny_config, tmp_path, cut
):
    config = tiny_config(*GATED)
    train(config, blind_cache, tmp_path / "whole")
    per_epoch = next(r["update"] for r in read_metrics(tmp_path / "whole/metrics.jsonl") if "eval" in r)
    log = [record for record in read_metrics(tmp_path / "whole/metrics.jsonl") if "losses" in record]
    assert [record["losses"]["alpha"] for record in log] == [0.0] * per_epoch + [3.0] * 2 * per_epoch
    cut(config, blind_cache, tmp_path / "cut", per_epoch)
    with pytest.raises(TrainError, match="was started with another eval_every: resume without changing it"):
        train(config.model_copy(update={"eval_every": 2}), blind_cache, tmp_path / "cut", resume=True)
    train(config, blind_cache, tmp_path / "cut", resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_gate_that_would_never_open_is_refused(wide_cache, make_cache, tiny_config):
    with pytest.raises(TrainError, match=r"loss.alpha_gate: .* first come after 9 updates, and the run ends after 6"):
        assemble(tiny_config(*GATED, "epochs=4", "batch_size=5", "eval_every=3", "updates=6"), wide_cache)
    cropped = make_cache(views=("crop.0",), classes={"train": (0, 1, 2, 3, 4)}, feature_splits=("train",))
    with pytest.raises(TrainError, match=r"loss\.alpha_gate: not all images of the validation classes have features"):
        assemble(tiny_config(*GATED), cropped)


def test_similarities_within_too_few_images_are_refused(build):
    for settings in (("batch_size=2",), ("batch_size=4", "optim.accumulate=2")):
        with pytest.raises(TrainError, match=r"loss\.align=relational: similarities within 2 images tell nothing"):
            build("loss.align=relational", *settings)
    build("loss.align=relational", "batch_size=2", "unlabeled_per_batch=1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["loss.alpha_by=gradient_ratio"], "add loss.drc_on=both"),
        (["loss.alpha_gate=validation"], "needs classes held out and scored on the way"),
        (["gim.width=16", "gim.heads=2", "loss.align=memory", "loss.drc_on=both"], "add loss.share_proxies=false"),
        (["gim.width=15", "gim.heads=2"], "2 heads do not divide the GIM's 15 channels"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(build, settings, said):
    with pytest.raises(TrainError, match=said):
        build(*settings)


def test_what_is_measured_and_remembered_resumes_to_the_very_same_end(cache, tiny_config, tmp_path, cut):
    config = tiny_config(*STATEFUL)
    train(config, cache, tmp_path / "whole")
    cut(config, cache, tmp_path / "cut", 2)
    train(config, cache, tmp_path / "cut", resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    scores, _, _ = evaluate_run(tmp_path / "whole", cache, CPU, load_trained)
    assert set(scores["auxiliary"]) == {"unmasked", "masked"}


def test_the_students_file_holds_nothing_of_a_projector(cache, tiny_config, tmp_path):
    from safetensors.torch import load_file

    train(tiny_config("loss.align=projector"), cache, tmp_path / "projected")
    train(tiny_config(), cache, tmp_path / "direct")
    names = [set(load_file(tmp_path / name / "student.safetensors")) for name in ("projected", "direct")]
    assert names[0] == names[1]
    assert not any("alignment" in name for name in load_file(tmp_path / "projected" / "gim.safetensors"))
