import pytest

from trainer.config import PRESETS, save_config
from trainer.errors import TrainError
from trainer.methods.settings import (
    changes,
    differing_fields,
    idle_settings,
    load_config,
    make_config,
    require_weights,
    settings_of,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_its_json(preset, tmp_path):
    config = make_config(preset, cache="somewhere", seed=3)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_the_paper_preset_holds_the_papers_setting():
    config = make_config("paper")
    assert (config.optim.lr, config.batch_size, config.epochs) == (1e-3, 32, 30)
    assert (config.gim.queries, config.gim.bridge_layers, config.timesteps) == (32, 3, None)
    assert (config.loss.drc_on, config.loss.cal, config.loss.stop_gradient) == ("ed", "raw", False)


def test_settings_win_over_flags_which_win_over_the_preset():
    config = make_config("demo", ["student.depth=2", "loss.alpha=0.5", "views=canonical,hflip"], loss__alpha=9, seed=4)
    assert (config.student.depth, config.loss.alpha, config.seed) == (2, 0.5, 4)
    assert config.views == ("canonical", "hflip")
    assert config.student.name == "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("text", "timesteps"), [("22,28", (22, 28)), ("22", (22,)), ("[10, 16]", (10, 16)), ("none", None)]
)
def test_timesteps_may_be_written_as_a_list_of_numbers(text, timesteps):
    assert make_config("demo", [f"timesteps={text}"]).timesteps == timesteps


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("student.dept=4", "no such field: student.dept"),
        ("loss.tau=-1", "loss.tau: .*greater than 0"),
        ("loss.cal=cosine", "loss.cal: .*'raw' or 'normalized'"),
        ("epochs=many", "epochs: .*integer"),
        ("epochs", "field=value"),
        ("seed.more=1", "seed"),
        ("seed=4294967296", "seed: .*less than 4294967296"),
    ],
)
def test_a_bad_setting_is_answered_with_one_line_that_names_the_field(setting, message):
    with pytest.raises(TrainError, match=message) as caught:
        make_config("paper", [setting])
    assert "\n" not in str(caught.value)


def test_only_fields_that_change_the_training_count_as_a_difference():
    a = make_config("paper", cache="a", workers=0, device="cpu")
    assert differing_fields(a, a.model_copy(update={"cache": "b", "workers": 4, "device": "auto"})) == []
    assert differing_fields(a, make_config("paper", ["loss.tau=0.1", "seed=1"])) == ["loss.tau", "seed"]


def test_the_description_has_a_line_for_every_field():
    text = settings_of("gcd").describe(make_config("demo"))
    assert "student.depth = 6" in text
    assert "optim.lr = 0.0005" in text
    assert len(text.splitlines()) > 45


def test_every_preset_but_the_papers_own_regresses_the_features_besides():
    weights = {preset: make_config(preset).regression.weight for preset in ("recommended", "small", "demo", "paper")}
    assert weights == {"recommended": 2.0, "small": 2.0, "demo": 2.0, "paper": 0.0}


@pytest.mark.parametrize("preset", ["small", "demo"])
def test_another_student_than_the_presets_has_nothing_of_its_architecture(preset):
    config = make_config(preset, student__name="resnet18")
    assert config.student.timm_kwargs() == {}
    assert config.optim.lr == make_config(preset).optim.lr  # what is not the network's stays
    given = make_config(preset, ["student.name=vit_small_patch16_224", "student.img_size=64"])
    assert given.student.timm_kwargs() == {"img_size": 64}
    assert make_config(preset, student__name="vit_tiny_patch16_224").student.depth == 6


def test_what_is_said_of_a_config_is_what_its_preset_does_not_say():
    assert changes(make_config("demo", cache="somewhere"), "demo") == ""
    said = changes(make_config("demo", ["loss.tau=0.1", "workers=2"]), "demo").splitlines()
    assert [line.split(" = ")[0].strip() for line in said] == ["workers", "loss.tau"]


def test_a_field_that_is_not_there_is_answered_with_the_nearest_one():
    with pytest.raises(TrainError, match=r"no such field: student.dept; did you mean student.depth\?"):
        make_config("demo", ["student.dept=4"])


def test_a_mode_and_a_method_that_disagree_are_refused():
    assert make_config("demo", ["mode=baseline"]).method == make_config("demo", mode="baseline").method == "baseline"
    with pytest.raises(TrainError, match="mode distill is method gcd, not baseline"):
        make_config("demo", mode="distill", method="baseline")


def test_the_paper_preset_wants_weights_and_says_how_to_give_them():
    for preset in ("recommended", "small", None):
        require_weights(make_config(preset or "demo"), preset)
    with pytest.raises(TrainError, match=r"add --pretrained .* or --student-weights FILE.safetensors"):
        require_weights(make_config("paper"), "paper")
    require_weights(make_config("paper", student__weights="some.safetensors"), "paper")
    require_weights(make_config("paper", student__pretrained=True), "paper")


def test_the_paper_preset_is_named_as_untuned_and_no_other(
    tmp_path, students, cache_path, tiny_baseline_settings, here
):
    code, said, _ = here("run", "--help")
    words = " ".join(said.replace("│", " ").split())
    assert code == 0
    assert "recommended, paper (as published, untuned; pretrained weights needed), small, demo;" in words
    weights = ["--student-weights", students["first"] / "student.safetensors", "--updates", 1, "--mode", "baseline"]
    run = ["run", "--cache", cache_path, "--preset", "paper", *tiny_baseline_settings, "--output", tmp_path / "run"]
    code, said, _ = here(*run, *weights)
    assert code == 0
    assert "method baseline, preset paper (as published, untuned;" in said


def test_a_setting_that_another_one_leaves_unread_is_named(tmp_path, here):
    said = here("run", "--preset", "small", "--set", "loss.memory=9", "--output", tmp_path, "--print-config")[2]
    assert "note: loss.memory changes nothing while loss.align is direct" in said
    given = {
        "distill": ["unlabeled_from=train", "loss.temperature=1", "gim.token_components=9", "loss.alpha_ratio=2"],
        "baseline": ["unlabelled.by=consistency", "unlabelled.images_from=both"],
        "relational": ["unlabeled_from=both", "loss.temperature=1"],  # its temperature is always read
    }
    for mode, settings in given.items():
        idle = [line.partition(" ")[0] for line in idle_settings(make_config("small", settings, mode=mode), "small")]
        expected = {setting.partition("=")[0] for setting in settings} - (
            {"loss.temperature"} if mode == "relational" else set()
        )
        assert sorted(idle) == sorted(expected)
        rows = ["unlabelled.per_batch=1"] if mode == "baseline" else ["unlabeled_per_batch=1"]
        used = ["loss.align=memory", "gim.token_norm=whiten", "loss.alpha_by=gradient_ratio"] * (mode == "distill")
        assert idle_settings(make_config("small", [*settings, *rows, *used], mode=mode), "small") == []
    by_ratio = make_config("small", ["loss.alpha=3", "loss.alpha_by=gradient_ratio"])
    assert idle_settings(by_ratio, "small") == ["loss.alpha changes nothing while loss.alpha_by is gradient_ratio"]
    assert all(not idle_settings(make_config(preset, method="gcd"), preset) for preset in PRESETS)


def test_the_recommended_preset_fine_tunes_whatever_network_is_named():
    for name in (None, "vit_tiny_patch16_224"):
        config = make_config("recommended", student__name=name)
        assert config.student.pretrained
        assert (config.optim.name, config.optim.grad_clip, config.optim.warmup > 0) == ("adamw", 1.0, True)
        assert 1e-5 <= config.optim.lr <= 3e-5
        assert 10 <= config.optim.gim_lr_scale <= config.optim.proxy_lr_scale <= 100
    assert make_config("recommended", mode="baseline").optim.proxy_lr_scale == config.optim.proxy_lr_scale


@pytest.mark.parametrize("mode", ["baseline", "regression", "relational", "distill", "auxiliary"])
def test_the_recommended_rates_are_those_of_the_students_kind(mode):
    convolutional = make_config("recommended", mode=mode, student__name="resnet18")
    untrained = make_config("recommended", ["student.pretrained=false"], mode=mode)
    weights = make_config("recommended", mode=mode, student__name="resnet18", student__weights="some.safetensors")
    assert convolutional.optim.lr == weights.optim.lr == 2e-3
    assert convolutional.student.batch_norm_momentum == 0.02
    assert untrained.optim.lr == 1e-3
    assert make_config("recommended", mode=mode, student__name="resnet18", optim__lr="1e-4").optim.lr == 1e-4
    for config in (convolutional, untrained):  # proxies at 1e-2, whatever the student's rate
        assert config.optim.lr * config.optim.proxy_lr_scale == pytest.approx(1e-2)
    assert "lr" not in changes(convolutional, "recommended")
    assert "student.name = resnet18" in changes(convolutional, "recommended")
    assert make_config("small", mode=mode, student__name="resnet18").optim.lr == 5e-4
