"""A preview shows what the teacher saw and made of it, from the cache alone."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cache_schema import CacheUnsealed, create_cache, open_cache
from cache_schema.errors import CacheRequestError, DitDistillError
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.cli import app
from pipeline.preview import page as preview_page
from pipeline.preview import run as preview_module
from pipeline.preview.page import FeatureRow, SampleBlock, draw_block, wrap
from pipeline.preview.run import find_rows, preview, random_rows

CONFIG = BuildConfig(
    timesteps=(16, 28), views=("canonical", "hflip"), image_size=32, image_format="png", batch=8, samples_per_shard=4,
    encoding="float16", taps=("hidden", "velocity"),
)  # fmt: skip


@pytest.fixture(scope="module")
def built(teacher, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview") / "cache"
    build(teacher, tiny_dataset, CONFIG, folder, log=str)
    return folder


@pytest.fixture
def partial(built, tmp_path):
    """The same cache before it was sealed and before its shard 2 (rows 8 to 11) was there."""
    folder = tmp_path / "partial"
    whole = open_cache(built)
    planned = whole.manifest.model_copy(
        update={"sealed": False, "fidelity": [], "bytes_features": None, "bytes_images": None}
    )
    writer = create_cache(folder, planned, whole.samples)
    for shard in set(writer.missing_shards()) - {2}:
        rows = list(writer.shard_rows(shard))
        views = {
            tap: np.stack([whole.read(rows, tap=tap, view=v).decode().numpy() for v in range(2)], axis=1)
            for tap in CONFIG.taps
        }
        writer.write_shard(shard, views)
    return folder


def block(**changes):
    image = Image.new("RGB", (64, 64), "#2050c0")
    given = {
        "heading": "sample", "facts": ["row 1"], "caption": "a bird", "image": image, "note": "",
        "box": (0.25, 0.5, 0.75, 1),
        "rows": [FeatureRow("hidden", False, [Image.new("RGB", (4, 4), "#c02020")] * 2)],
    }  # fmt: skip
    return SampleBlock(**{**given, **changes})


def pixels(image, wanted):
    return (np.asarray(image) == np.asarray(wanted)).all(axis=-1)


def tile(page, row, step):
    """The map in a row and timestep column of the first sample of a page."""
    side, gap, line = preview_page._CELL, preview_page._GAP, preview_page._LINE
    x = preview_page._MARGIN + preview_page._IMAGE + 2 * gap + (1 + step) * (side + gap)
    y = preview_page._MARGIN + 4 * line + row * (line + side + gap)
    return np.asarray(page)[y : y + side, x : x + side]


def test_the_box_is_drawn_where_it_is_in_the_image():
    yellow = pixels(draw_block(block(), ["p = 1", "p = 2"]), (0xFF, 0xD6, 0x0A))
    rows, columns = np.nonzero(yellow)
    side = preview_page._IMAGE
    assert abs(columns.min() - side / 4) <= 2
    assert abs(columns.max() - side * 3 / 4) <= 2
    assert abs(rows.min() - side / 2) <= 2
    assert abs(rows.max() - side) <= 3


def test_every_token_is_a_square_of_its_colour_in_its_place():
    tokens = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8))
    panel = np.asarray(draw_block(block(rows=[FeatureRow("hidden", False, [tokens])]), ["p = 1"]))
    x = preview_page._IMAGE + 2 * preview_page._GAP + preview_page._CELL + preview_page._GAP
    y = panel.shape[0] - 1
    found = [tuple(panel[r, x + 5]) for r in range(y)]
    first_column = [tuple(int(v) for v in c) for c in np.asarray(tokens)[:, 0]]
    assert [c for c in dict.fromkeys(found) if c in first_column] == first_column
    assert all(found.count(c) == preview_page._CELL // 4 for c in first_column)


def test_the_object_view_of_a_mirrored_view_is_mirrored():
    image = Image.new("RGB", (64, 64), "#ff0000")
    image.paste("#0000ff", (32, 0, 64, 64))
    rows = [FeatureRow("hidden", False, []), FeatureRow("hidden, hflip", True, [])]
    panel = np.asarray(draw_block(block(image=image, box=None, rows=rows), []))
    x = preview_page._IMAGE + 2 * preview_page._GAP
    left = [tuple(panel[r, x + 4]) for r in range(panel.shape[0])]
    assert left.index((255, 0, 0)) < left.index((0, 0, 255))


def test_a_random_crop_is_shown_in_place_of_the_box():
    image = Image.new("RGB", (64, 64), "#ff0000")
    image.paste("#0000ff", (32, 0, 64, 64))
    panel = draw_block(block(image=image, rows=[FeatureRow("hidden, crop.0", False, [], (0.6, 0.1, 0.9, 0.4))]), [])
    seen = panel.crop((preview_page._IMAGE + 2 * preview_page._GAP, preview_page._LINE * 2, panel.width, panel.height))
    assert (0, 0, 255) in seen.getdata()
    assert (255, 0, 0) not in seen.getdata()


def test_words_are_wrapped_and_never_wider_than_their_column():
    text = "a very small bird with a " + "w" * 200 + " tail"
    lines = wrap(text, 120, 13)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(preview_page._length(line, 13) <= 120 for line in lines)


def test_without_a_system_font_greek_letters_are_spelled_out(monkeypatch):
    monkeypatch.setattr(preview_page, "_FONTS", ())
    preview_page._font.cache_clear()
    try:
        assert preview_page._shown("σ = 0.5, é", preview_page._font(13)[1]) == "sigma = 0.5, ?"
        draw_block(block(caption="σ"), ["p = 1", "p = 2"])
    finally:
        preview_page._font.cache_clear()


def test_a_preview_has_a_map_for_every_view_tap_and_timestep(built, tmp_path):
    cache = open_cache(built)
    one = preview(cache, [0], tmp_path / "one.png")
    two = preview(cache, [0, 1], tmp_path / "two.jpg")
    assert Image.open(tmp_path / "one.png").size == one.size
    assert Image.open(tmp_path / "two.jpg").format == "JPEG"
    assert two.width == one.width > preview_page._IMAGE + 3 * preview_page._CELL
    assert one.height > 4 * preview_page._CELL  # two views of two taps
    assert two.height > 8 * preview_page._CELL


def test_equal_caches_have_equal_previews(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    preview(open_cache(built), [3], tmp_path / "a.png")
    preview(open_cache(copy), [3], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_timesteps_out_of_order_keep_their_columns(built, tmp_path):
    """Colours are fitted to the clearest timestep, wherever it stands."""
    cache = open_cache(built)
    steps = cache.manifest.curriculum
    turned = steps.model_copy(update={"timesteps": steps.timesteps[::-1], "sigmas": steps.sigmas[::-1]})
    planned = cache.manifest.model_copy(update={"curriculum": turned, "sealed": False, "cache_id": ""})
    writer = create_cache(tmp_path / "turned", planned, cache.samples)
    for shard in writer.missing_shards():
        rows = list(writer.shard_rows(shard))
        writer.write_shard(
            shard,
            {
                tap: np.stack([cache.read(rows, tap=tap, view=v).decode().numpy()[:, ::-1] for v in range(2)], axis=1)
                for tap in CONFIG.taps
            },
        )
    there = preview(open_cache(tmp_path / "turned", allow_partial=True), [0], tmp_path / "t.png")
    here = preview(cache, [0], tmp_path / "h.png")
    for row in range(4):
        assert np.array_equal(tile(here, row, 0), tile(there, row, 1))
        assert np.array_equal(tile(here, row, 1), tile(there, row, 0))
        assert not np.array_equal(tile(here, row, 0), tile(here, row, 1))


def test_a_cache_without_images_or_boxes_still_has_maps(teacher, tiny_dataset, tmp_path):
    class Boxless:
        name, protocol, superclass = tiny_dataset.name, tiny_dataset.protocol, tiny_dataset.superclass
        samples = tuple(replace(s, box=None, box_source="", caption="") for s in tiny_dataset.samples[:20])
        read = staticmethod(tiny_dataset.read)

    config = replace(CONFIG, with_images=False, feature_splits=("train",), views=("canonical",), taps=("hidden",))
    build(teacher, Boxless(), config, tmp_path / "c", log=str)
    assert preview(open_cache(tmp_path / "c"), [0], tmp_path / "out.webp").height > preview_page._CELL


def test_a_partial_cache_shows_what_is_there(partial, tmp_path):
    cache = open_cache(partial, allow_partial=True)
    preview(cache, [0], tmp_path / "out.png")  # its image is not built: a grey square says so
    with pytest.raises(CacheUnsealed, match="row 9"):
        preview(cache, [9], tmp_path / "no.png")
    assert not set(random_rows(cache, 100, 0)) & set(range(8, 12))
    assert not (tmp_path / "no.png").exists()


def test_samples_are_found_by_id_and_by_row_and_near_ones_are_suggested(built):
    cache = open_cache(built)
    ids = cache.samples["id"].to_pylist()
    assert find_rows(cache, [ids[5], "2"]) == [5, 2]
    with pytest.raises(CacheRequestError, match=f"no sample 'train-000-0O1'.*{ids[1]}"):
        find_rows(cache, ["train-000-0O1"])
    with pytest.raises(CacheRequestError, match="no row 999: it has the rows 0 to 45"):
        find_rows(cache, ["999"])


def test_random_samples_are_the_same_for_the_same_seed(built):
    cache = open_cache(built)
    assert random_rows(cache, 5, 1) == random_rows(cache, 5, 1) != random_rows(cache, 5, 2)
    assert len(set(random_rows(cache, 5, 1))) == 5
    assert random_rows(cache, 1000, 0) == list(cache.feature_rows)


def test_samples_without_features_are_refused_with_the_reason(built, teacher, tiny_dataset, tmp_path):
    with pytest.raises(CacheRequestError, match="split test; the cache has features of train, unlabeled alone"):
        preview(open_cache(built), [40], tmp_path / "out.png")

    class Damaged:
        name, protocol, superclass = tiny_dataset.name, tiny_dataset.protocol, tiny_dataset.superclass
        samples = tiny_dataset.samples

        def read(self, sample):
            return b"" if sample.id == self.samples[0].id else tiny_dataset.read(sample)

    from pipeline.inputs.tolerance import Tolerance

    config = replace(CONFIG, views=("canonical",), taps=("hidden",))
    build(teacher, Damaged(), config, tmp_path / "c", tolerance=Tolerance(max_bad=0.5), log=str)
    cache = open_cache(tmp_path / "c")
    with pytest.raises(CacheRequestError, match=f"{tiny_dataset.samples[0].id} .* is quarantined: "):
        preview(cache, find_rows(cache, [tiny_dataset.samples[0].id]), tmp_path / "out.png")


def test_too_many_samples_for_one_picture_are_refused_with_a_number_that_fits(built, tmp_path, monkeypatch):
    monkeypatch.setattr(preview_module, "_MAX_HEIGHT", 2_500)
    cache = open_cache(built)
    with pytest.raises(DitDistillError, match=r"26 samples make a picture .* ask for (\d+) or fewer") as refused:
        preview(cache, list(cache.feature_rows), tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
    fit = int(str(refused.value).split("ask for ")[1].split()[0])
    assert preview(cache, list(range(fit)), tmp_path / "out.png").height > 1_250


def test_the_command_refuses_other_formats_before_it_reads_anything(tmp_path):
    for name in ("out.gif", "out"):
        with pytest.raises(DitDistillError, match=r"end the name in \.png"):
            CliRunner().invoke(
                app, ["preview", str(tmp_path), "--sample", "0", "-o", str(tmp_path / name)], catch_exceptions=False
            )
    assert CliRunner().invoke(app, ["preview", str(tmp_path), "-o", "x.png"]).exit_code == 2


def test_the_command_needs_neither_teacher_nor_data_set_nor_model_library(built, tmp_path):
    script = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'peft'): sys.modules[name] = None\n"
        "sys.argv = ['dit-cache', 'preview', sys.argv[1], '--random', '2', '--sample', '0', '-o', sys.argv[2]]\n"
        "from pipeline.cli import main; main()\n"
    )
    command = [sys.executable, "-c", script, str(built), str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert "of 26 samples" in done.stdout
    assert Image.open(tmp_path / "out.png").format == "PNG"


def test_a_cache_that_is_not_complete_is_refused_unless_allowed(partial, tmp_path):
    with pytest.raises(CacheUnsealed):
        CliRunner().invoke(
            app, ["preview", str(partial), "--sample", "0", "-o", str(tmp_path / "o.png")], catch_exceptions=False
        )
    for record in (partial / "journal").glob("features-*"):
        record.unlink()
    done = CliRunner().invoke(
        app, ["preview", str(partial), "--random", "1", "--allow-partial", "-o", str(tmp_path / "o.png")]
    )
    assert isinstance(done.exception, CacheUnsealed)
    assert "no features yet" in str(done.exception)
