"""A manifest says the same after a round trip, has one name, and is believed only if it is whole and known."""

import json
from pathlib import Path
from typing import Any

import pytest
from cache_building import many_examples, tiny_manifest, tiny_samples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache_schema import (
    CacheCorrupt,
    CacheNotFound,
    Curriculum,
    DatasetInfo,
    Encoding,
    Fidelity,
    ImagesInfo,
    Manifest,
    Provenance,
    StoreInfo,
    TapInfo,
    TeacherInfo,
    UnsupportedSchema,
)
from cache_schema.format import manifest_file as files
from cache_schema.format.identity import canonical_json, compute_cache_id, differing_fields
from cache_schema.format.manifest import SCHEMA_VERSION
from cache_schema.format.manifest_file import load_manifest, parse_manifest, render_document, render_manifest
from cache_schema.format.schema import SCHEMA_PATH, render_schema
from cache_schema.storage.local import LocalFolder

text = st.text(max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
KNOWN_ID = "293384ba40137179a2159e738b7d4e7c6f22bb06271eb5ffe4f54bcd9ff4f46d"

sha256 = st.text("0123456789abcdef", min_size=64, max_size=64)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    steps = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True))
    rows, per_shard = draw(st.integers(0, 1000)), draw(st.integers(1, 100))
    names = draw(st.lists(st.sampled_from(["velocity", "hidden", "double.1", "single.37"]), min_size=1, unique=True))
    images = draw(
        st.none() | st.builds(ImagesInfo, size=st.integers(1, 999), format=st.just("jpeg"), quality=st.none())
    )
    return Manifest(
        dataset=DatasetInfo(
            name=draw(text),
            protocol=draw(text),
            fingerprint=draw(text),
            superclass=draw(text),
            counts=draw(st.dictionaries(text, st.integers(0, 9), max_size=3)),
            feature_splits=draw(st.lists(text, max_size=2)),
            feature_rows=rows,
        ),
        teacher=TeacherInfo(
            family=draw(text),
            source=draw(text),
            revision=draw(st.none() | text),
            pipeline_class=draw(text),
            digests=draw(st.dictionaries(text, sha256, max_size=3)),
            lora_digest=draw(st.none() | sha256),
            dtype=draw(text),
            resolution=draw(st.integers(1, 2048)),
            text=draw(st.sampled_from(["caption", "none"])),
            guidance=draw(st.none() | finite),
        ),
        curriculum=Curriculum(
            num_steps=50,
            timesteps=steps,
            sigmas=draw(st.lists(finite, min_size=len(steps), max_size=len(steps))),
            seed=draw(st.integers()),
        ),
        taps=[TapInfo(name=name, tokens=6, channels=draw(st.integers(1, 99)), grid=(2, 3)) for name in names],
        encoding=Encoding(
            kind=draw(st.sampled_from(["float32", "float16", "bfloat16", "int8", "float8_e4m3"])),
            pool=draw(st.integers(1, 3)),
            compression=draw(st.sampled_from(["none", "zstd", "blosc:lz4", "blosc:zstd"])),
        ),
        views=draw(st.lists(text, min_size=1, max_size=3, unique=True)),
        images=images,
        store=StoreInfo(
            samples_per_shard=per_shard,
            feature_shards=-(-rows // per_shard),
            images_per_shard=9,
            image_shards=0 if images is None else draw(st.integers(0, 99)),
        ),
        fidelity=draw(
            st.lists(
                st.builds(
                    Fidelity,
                    tap=st.sampled_from(names),
                    timestep=st.sampled_from(steps),
                    **dict.fromkeys(("cosine_mean", "cosine_min", "relative_error", "channel_error"), finite),
                ),
                max_size=2,
            )
        ),
        provenance=draw(
            st.builds(Provenance, created=st.none() | text, seconds=st.none() | finite, checksum=st.none())
        ),
        sealed=draw(st.booleans()),
    )


def tiny(**changes: Any) -> Manifest:
    samples, rows = tiny_samples()
    return tiny_manifest(samples, rows, **changes)


def changed(manifest: Manifest, part: str, **values: Any) -> Manifest:
    """The manifest with some fields of one part replaced, and the id that follows."""
    return Manifest(
        **{
            **{name: getattr(manifest, name) for name in Manifest.model_fields if name != "cache_id"},
            part: getattr(manifest, part).model_copy(update=values),
        }
    )


@many_examples
@given(manifests())
def test_a_manifest_is_the_same_after_a_round_trip_through_its_file(manifest: Manifest) -> None:
    data = render_manifest(manifest)
    again = parse_manifest(data, "manifest.json")
    assert again.model_copy(update={"provenance": manifest.provenance}) == manifest
    assert again.provenance.checksum is not None
    assert render_manifest(again) == data


@many_examples
@given(st.binary(max_size=300))
def test_bytes_that_are_no_manifest_are_called_corrupt(data: bytes) -> None:
    with pytest.raises(CacheCorrupt):
        parse_manifest(data, "manifest.json")


@many_examples
@given(st.data())
def test_no_changed_byte_of_a_manifest_gives_another_manifest(data: st.DataObject) -> None:
    manifest = tiny()
    original = render_manifest(manifest)
    place = data.draw(st.integers(0, len(original) - 1))
    damaged = bytearray(original)
    damaged[place] ^= data.draw(st.integers(1, 255))
    try:
        found = parse_manifest(bytes(damaged), "manifest.json")
    except (CacheCorrupt, UnsupportedSchema):
        return
    # White space and the like may differ without changing what the manifest says.
    assert render_manifest(found) == original


def test_the_cache_id_does_not_depend_on_where_things_came_from_or_how_they_are_stored() -> None:
    manifest = tiny()
    same = [
        changed(manifest, "teacher", source="/elsewhere", revision="main"),
        changed(manifest, "encoding", compression="zstd"),
        changed(manifest, "dataset", counts={"train": 1}),
        changed(manifest, "provenance", created="2026-01-01", seconds=12.0),
        tiny(samples_per_shard=5),
        manifest.model_copy(update={"sealed": True, "bytes_features": 12}),
    ]
    assert {compute_cache_id(other.document()) for other in same} == {manifest.cache_id}


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("dataset", {"fingerprint": "another"}),
        ("dataset", {"protocol": "another"}),
        ("teacher", {"digests": {"transformer": "c" * 64}}),
        ("teacher", {"lora_digest": "d" * 64}),
        ("teacher", {"dtype": "float32"}),
        ("teacher", {"guidance": 3.0}),
        ("curriculum", {"seed": 8}),
        ("curriculum", {"sigmas": [0.9, 0.6, 0.04]}),
        ("encoding", {"kind": "int8"}),
        ("images", {"size": 33}),
    ],
)
def test_the_cache_id_depends_on_what_determines_the_numbers(part: str, values: dict[str, Any]) -> None:
    manifest = tiny()
    other = changed(manifest, part, **values)
    assert other.cache_id != manifest.cache_id
    assert all(
        name.startswith(f"{part}.{next(iter(values))}")
        for name in differing_fields(manifest.document(), other.document())
    )
    assert differing_fields(manifest.document(), other.document())


def test_the_cache_id_is_the_one_this_format_has_always_given() -> None:
    """If this fails, caches that exist are no longer found under their names."""
    assert tiny().cache_id == KNOWN_ID


def test_a_manifest_does_not_carry_another_ones_name() -> None:
    document = tiny().model_dump()
    with pytest.raises(ValidationError, match="not that of its contents"):
        Manifest.model_validate({**document, "cache_id": "0" * 64})


@pytest.mark.parametrize(
    "tap",
    [
        {"name": "../evil", "tokens": 6, "channels": 8, "grid": (2, 3)},
        {"name": "hidden.scale", "tokens": 6, "channels": 8, "grid": (2, 3)},
        {"name": "hidden\n", "tokens": 6, "channels": 8, "grid": (2, 3)},
        {"name": "hidden", "tokens": 7, "channels": 8, "grid": (2, 3)},
        {"name": "hidden", "tokens": 1 << 18, "channels": 1 << 18, "grid": (512, 512)},
    ],
)
def test_taps_that_are_no_folder_or_promise_the_impossible_are_refused(tap: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TapInfo(**tap)


def test_a_timestep_needs_a_sigma_and_lies_on_the_schedule() -> None:
    with pytest.raises(ValidationError, match="2 timesteps but 1 sigmas"):
        Curriculum(num_steps=28, timesteps=[1, 2], sigmas=[0.5], seed=0)
    with pytest.raises(ValidationError, match="beyond num_steps"):
        Curriculum(num_steps=28, timesteps=[29], sigmas=[0.5], seed=0)


def test_a_manifest_is_immutable() -> None:
    with pytest.raises(ValidationError):
        tiny().dataset.name = "another"  # type: ignore[misc]


def test_a_missing_manifest_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound, match="no cache at"):
        load_manifest(LocalFolder(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("version", "advice"), [(SCHEMA_VERSION + 1, "newer dit-distill"), (0, "nothing that old"), (10**30, "newer")]
)
def test_an_unknown_schema_version_is_refused_by_its_number(version: int, advice: str) -> None:
    document = {**json.loads(render_manifest(tiny())), "schema_version": version}
    with pytest.raises(UnsupportedSchema, match=f"schema version {version}.*{advice}"):
        parse_manifest(render_document(document), "manifest.json")


def test_an_older_manifest_is_migrated_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up history: two versions ago there were no views, one version ago the seed had another name."""
    manifest = tiny()

    def name_views(document: dict[str, Any]) -> dict[str, Any]:
        return {**document, "views": manifest.views}

    def rename_seed(document: dict[str, Any]) -> dict[str, Any]:
        curriculum = dict(document["curriculum"])
        seed = curriculum.pop("noise_seed")
        return {**document, "curriculum": {**curriculum, "seed": seed}}

    monkeypatch.setattr(files, "MIGRATIONS", {SCHEMA_VERSION - 2: name_views, SCHEMA_VERSION - 1: rename_seed})
    document = json.loads(render_manifest(manifest))
    del document["views"]
    document["curriculum"]["noise_seed"] = document["curriculum"].pop("seed")
    document |= {"schema_version": SCHEMA_VERSION - 2}
    document["provenance"]["checksum"] = files.manifest_checksum(document)
    found = parse_manifest(render_document(document), "manifest.json")
    assert found.model_copy(update={"provenance": manifest.provenance}) == manifest


def test_a_gap_in_the_migrations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MIGRATIONS", {SCHEMA_VERSION - 2: lambda document: document})
    document = {**json.loads(render_manifest(tiny())), "schema_version": SCHEMA_VERSION - 2}
    document["provenance"]["checksum"] = None
    with pytest.raises(UnsupportedSchema, match=f"no migration leads from schema version {SCHEMA_VERSION - 1}"):
        parse_manifest(render_document(document), "manifest.json")


@pytest.mark.parametrize(
    "data",
    [
        b'{"schema_version": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"schema_version": 1}',
        b"[1]",
        b'{"schema_version": true}',
        b'{"schema_version": 1, "provenance": {"checksum": "00000000"}, "x": NaN}',
        b"\x80\x04\x95",
        b"",
    ],
)
def test_hostile_manifests_are_called_corrupt(data: bytes) -> None:
    with pytest.raises(CacheCorrupt):
        parse_manifest(data, "manifest.json")


def test_a_manifest_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CacheCorrupt, match="larger than"):
        load_manifest(LocalFolder(tmp_path))


def test_the_committed_json_schema_is_that_of_the_models() -> None:
    assert render_schema() == SCHEMA_PATH.read_bytes(), "run python -m cache_schema.format.schema"


@many_examples
@given(
    st.recursive(
        st.none() | st.booleans() | finite | st.integers() | text, lambda x: st.lists(x) | st.dictionaries(text, x)
    )
)
def test_canonical_json_is_one_text_that_says_the_value(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


def test_canonical_json_orders_keys_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "a": [0.1, "é"]}) == '{"a":[0.1,"\\u00e9"],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
