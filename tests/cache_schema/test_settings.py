"""The settings engine: what is typed, saved or preset becomes one checked value, of dataclasses and Pydantic models."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from cache_schema.settings import (
    Setting,
    Settings,
    SettingsError,
    check_limits,
    fields_of,
    flatten,
    merge,
    parse_value,
    unflatten,
)


def share(text):
    """1% or 0.01."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a share like 1% or 0.01") from None


class Loss(BaseModel, frozen=True, extra="forbid"):
    tau: float = Field(default=0.05, gt=0)
    target: Literal["masked", "none"] = "masked"
    extra: dict[str, bool | int | float | str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    epochs: Annotated[int, Setting("Passes over the images.", least=1)] = 30
    workers: Annotated[int, Setting("Loader processes.", least=0, resumable=True)] = 0
    left_out: Annotated[float, Setting("Share.", least=0, most=1, option="--max-bad", reads=share)] = 0.01
    rate: Annotated[float, Setting("Learning rate.", above=0)] = 0.1
    batch: Annotated[int | Literal["auto"], Setting(least=1)] = 8
    pca: int | None = None
    exact: bool = False

    def __post_init__(self):
        check_limits(self)


class Model(BaseModel, frozen=True, extra="forbid"):
    cache: Path | None = None
    timesteps: tuple[int, ...] | None = None
    views: tuple[str, ...] = ("canonical",)
    loss: Loss = Loss()
    loop: Loop = Loop()


@dataclass(frozen=True)
class Plain:
    cache: Path | None = None
    timesteps: tuple[int, ...] | None = None
    views: tuple[str, ...] = ("canonical",)
    loss: Loss = field(default_factory=Loss)
    loop: Loop = field(default_factory=Loop)


# A model whose parts are dataclasses and the other way round: neither makes a difference to a setting.
BOTH = [Settings(kind, command="x run", example="loop.epochs=3") for kind in (Model, Plain)]
both = pytest.mark.parametrize("settings", BOTH, ids=["model", "dataclass"])


def typed(**values):
    return st.sampled_from(list(values.items()))


def shown(strategy, text=str):
    """What a user types, and the plain value that is meant."""
    return strategy.map(lambda value: (text(value), value))


words = st.text(st.characters(categories=("L", "N"), include_characters="-_./ "), min_size=1).filter(
    lambda word: word == word.strip() and word.lower() != "none"
)
TYPED = {
    "cache": st.one_of(typed(none=None), shown(words.map(lambda word: str(Path(word))))),
    "timesteps": st.one_of(
        typed(none=None), shown(st.lists(st.integers(), min_size=1), lambda several: ",".join(map(str, several)))
    ),
    "views": shown(st.lists(words, min_size=1), ", ".join),
    "loss.tau": shown(st.floats(1e-300, 1e300)),
    "loss.target": typed(masked="masked", none="none"),
    "loss.extra.depth": shown(st.integers()),
    "loss.extra.pool": typed(avg="avg", true=True),
    "loop.epochs": shown(st.integers(1, 10**12)),
    "loop.left_out": st.one_of(shown(st.floats(0, 1)), st.sampled_from([("1%", 0.01), ("50%", 0.5)])),
    "loop.batch": st.one_of(typed(auto="auto"), shown(st.integers(1, 99))),
    "loop.pca": st.one_of(typed(none=None), shown(st.integers())),
    "loop.exact": typed(true=True, false=False),
}


@both
@many_examples
@given(chosen=st.fixed_dictionaries({}, optional=TYPED))
def test_what_is_typed_survives_validation_and_json(tmp_path_factory, settings, chosen):
    config = settings.make({}, {}, [f"{name}={text}" for name, (text, _) in chosen.items()])
    values = settings.flat(config)
    for name, (_, meant) in chosen.items():
        assert values[name] == meant
        assert type(values[name]) is type(meant)
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(settings.render(config))
    assert settings.load(path) == config
    assert settings.make({}, values) == config
    assert settings.validate(settings.plain(config)) == config


names = st.text(st.characters(categories=("L",)), min_size=1, max_size=3)
nested = st.recursive(
    st.dictionaries(names, st.integers() | st.none() | st.lists(st.integers())),
    lambda inner: st.dictionaries(names, inner | st.integers()),
)


@many_examples
@given(values=nested)
def test_flattening_is_undone_by_unflattening(values):
    assert unflatten(flatten(values)) == values


@many_examples
@given(lower=nested, upper=nested)
def test_the_upper_layer_has_the_last_word_and_neither_is_changed(lower, upper):
    before = json.dumps([lower, upper])
    merged = merge(lower, upper)
    for name, value in flatten(upper).items():
        assert value == {} or flatten(merged)[name] == value
    assert merge(merged, upper) == merged
    assert json.dumps([lower, upper]) == before


@both
def test_settings_win_over_flags_which_win_over_presets(settings):
    preset = {"loop": {"epochs": 3, "rate": 0.5}, "views": ["hflip"]}
    config = settings.make(preset, {"loop__epochs": 4, "loop.pca": 2, "cache": None}, ["loop.epochs=5"])
    assert (config.loop.epochs, config.loop.rate, config.loop.pca, config.views) == (5, 0.5, 2, ("hflip",))
    assert preset == {"loop": {"epochs": 3, "rate": 0.5}, "views": ["hflip"]}


@both
def test_a_table_grows_without_changing_the_preset(settings):
    preset = {"loss": {"extra": {}}}
    assert settings.make(preset, {}, ["loss.extra.depth=3"]).loss.extra == {"depth": 3}
    assert preset == {"loss": {"extra": {}}}


@both
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("loop.epoch=3", "no such field: loop.epoch; did you mean loop.epochs? `x run --print-config` lists them"),
        ("lop.epochs=3", "no such field: lop.epochs; did you mean loop.epochs?"),
        ("epochs=3", "no such field: epochs; did you mean loop.epochs?"),
        ("cache.more=3", "no such field: cache.more; did you mean"),
        ("loop=3", "loop is a group of settings; name one of them, for example loop.epochs"),
        ("loop.epochs", "--set loop.epochs: write it as field=value, for example loop.epochs=3"),
        ("loop.epochs=x", "loop.epochs: Input should be a valid integer (got 'x')"),
        ("loop.epochs=2.5", "loop.epochs: Input should be a valid integer"),
        ("loop.epochs=none", "loop.epochs: Input should be a valid integer (got 'none')"),
        ("loop.epochs=0", "--epochs must be at least 1, not 0"),
        ("loop.batch=0", "--batch must be at least 1, not 0"),
        ("loop.left_out=much", "loop.left_out: 'much' is not a share like 1% or 0.01"),
        ("loop.left_out=101%", "--max-bad must lie from 0 to 1, not 1.01"),
        ("loop.rate=NaN", "--rate must be positive, not nan"),
        ("loss.tau=-1", "loss.tau: Input should be greater than 0 (got -1)"),
        ("loss.target=all", "loss.target: Input should be 'masked' or 'none' (got 'all')"),
        ("loss.extra.depth=[]", "loss.extra"),
        ("timesteps=4,q", "timesteps: Input should be a valid integer"),
        ("loop.epochs=" + "[" * 100_000, "loop.epochs: Input should be a valid integer"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_field_and_what_it_accepts(settings, setting, said):
    with pytest.raises(SettingsError) as caught:
        settings.make({}, {}, [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@both
@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"lop": {}}', '{"loop": 3}', '{"loop": {"epochs": "3"}}'])
def test_a_wrong_file_is_one_line_that_names_it(settings, tmp_path, text):
    path = tmp_path / "config.json"
    with pytest.raises(SettingsError, match="there is no such configuration file"):
        settings.load(path)
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        settings.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@both
def test_fields_that_may_change_on_resume_are_no_difference(settings):
    a = settings.make({})
    assert settings.resumable() == {"loop.workers"}
    assert settings.differing(a, settings.make({}, {"loop__workers": 4})) == []
    assert settings.differing(a, settings.make({}, {"loop__workers": 4, "loss__tau": 1, "views": ["x"]})) == [
        "loss.tau", "views"
    ]  # fmt: skip


@both
def test_a_configuration_is_described_whole_or_by_what_differs_from_a_preset(settings):
    base = settings.make({"loop": {"epochs": 3}})
    config = settings.make({"loop": {"epochs": 3}}, {}, ["loss.tau=0.5", "loss.extra.depth=2"])
    assert len(settings.describe(base).splitlines()) == len(settings.fields)
    assert "  loop.epochs = 3" in settings.describe(config).splitlines()
    assert settings.changes(base, base) == ""
    assert settings.changes(config, base).splitlines() == [
        "  loss.tau = 0.5 (not 0.05)",
        "  loss.extra.depth = 2 (not None)",
    ]


def test_limits_stated_by_pydantic_count_as_the_fields_own():
    class Sized(BaseModel):
        side: Annotated[int, Setting("Pixels.", metavar="PX")] = Field(default=8, ge=1, le=64)
        rate: float = Field(default=1.0, gt=0, description="How fast.")

    side, rate = fields_of(Sized).values()
    assert (side.setting.help, side.setting.metavar, side.setting.least, side.setting.most) == ("Pixels.", "PX", 1, 64)
    assert (rate.setting.help, rate.setting.above, rate.default) == ("How fast.", 0, 1.0)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("[10, 16]", tuple[int, ...] | None, [10, 16]),
        ("22", tuple[int, ...] | None, [22]),
        ("a,b", Annotated[tuple[str, ...], "names"] | None, ["a", "b"]),
        ("7", str, "7"),
        ("true", str | None, "true"),
        ("7", Path, "7"),
        ("none", Literal["none", "zstd"] | None, "none"),
        ("False", bool, False),
        ("none", bool, "none"),
        ("auto", int | Literal["auto"], "auto"),
        ("8", int | Literal["auto"], 8),
    ],
)
def test_text_means_what_its_field_can_be(text, kind, value):
    assert parse_value(text, kind) == value
    assert type(parse_value(text, kind)) is type(value)


@dataclass
class Sided:
    side: Annotated[int, Setting(most=3)] = 4

    def __post_init__(self):
        check_limits(self, ZeroDivisionError)


def test_a_limit_holds_however_the_value_is_made():
    with pytest.raises(SettingsError, match="--epochs must be at least 1, not 0"):
        Loop(epochs=0)
    with pytest.raises(ZeroDivisionError, match="--side must be at most 3, not 4"):
        Sided()
