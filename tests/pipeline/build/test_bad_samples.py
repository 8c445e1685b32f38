"""Bad images, captions and features are left out with their reason, counted, and stop a build that tolerates fewer."""

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from cache_schema import open_cache
from cache_schema.care.describe import describe, describe_text
from cache_schema.care.verify import verify
from cache_schema.cli import run
from cache_schema.format.journal import read_record
from cache_schema.storage.local import LocalFolder
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.cli import app
from pipeline.inputs.scan import scan, scan_sample
from pipeline.inputs.tolerance import BadSamples, Tolerance, TooManyBadSamples
from pipeline.teachers import PRESETS
from pipeline.teachers.base import TextEmbedding
from pipeline.teachers.flux import FluxTeacher

CONFIG = BuildConfig(
    timesteps=(16, 28), image_size=16, image_format="png", batch=3, samples_per_shard=4, encoding="float32"
)
LENIENT = Tolerance(max_bad=0.2)
CHANGES = {
    "outside": {"box": (200.0, 200.0, 300.0, 300.0)},
    "inverted": {"box": (40.0, 40.0, 10.0, 10.0)},
    "not a number": {"box": (0.0, 0.0, math.nan, 9.0)},
    "infinite": {"box": (0.0, 0.0, math.inf, 9.0)},
    "blank": {"caption": " \n"},
}


class Damaged:
    """A data set in which some files and annotations have gone bad: {sample id: how}."""

    def __init__(self, inner, damage):
        self.inner, self.damage = inner, damage
        self.name, self.protocol, self.superclass = inner.name, inner.protocol, inner.superclass
        self.samples = [replace(s, **CHANGES.get(damage.get(s.id), {})) for s in inner.samples]

    def read(self, sample):
        kind = self.damage.get(sample.id)
        if kind == "missing":
            raise FileNotFoundError(2, "No such file or directory", sample.source)
        data = self.inner.read(sample)
        return {"empty": b"", "truncated": data[: len(data) // 2], "no image": b"<html>"}.get(kind, data)


def damage(dataset, *kinds: str) -> Damaged:
    train = [s.id for s in dataset.samples if s.split == "train"]
    return Damaged(dataset, dict(zip(train, kinds, strict=False)))


REASONS = {
    "missing": "cannot be read: No such file or directory",
    "empty": "the file is empty",
    "truncated": "not a complete image",
    "no image": "not an image of a known format",
    "outside": "no pixel inside",
    "inverted": "no pixel inside",
    "not a number": "finite",
    "infinite": "finite",
    "blank": "its caption is empty",
}


def test_bad_samples_are_left_out_with_their_reason_counted_and_listed(teacher, tiny_dataset, tmp_path):
    data, said = damage(tiny_dataset, *REASONS), []
    manifest = build(teacher, data, CONFIG, tmp_path / "c", log=said.append, tolerance=LENIENT)
    cache = open_cache(tmp_path / "c")
    recorded = {item.id: item.reason for item in read_record(LocalFolder(tmp_path / "c"), "layout").quarantined}
    assert {data.damage[name]: reason for name, reason in recorded.items()}.keys() == REASONS.keys()
    assert all(REASONS[data.damage[name]] in reason for name, reason in recorded.items())
    assert recorded == {r["id"]: r["reason"] for r in cache.samples.to_pylist() if r["state"] == "quarantined"}
    assert manifest.dataset.quarantined == len(recorded) == 9
    assert len(cache) == 26 - 9
    assert {item["id"]: item["reason"] for item in describe(tmp_path / "c")["quarantined"]} == recorded
    assert all(reason in describe_text(tmp_path / "c") for reason in recorded.values())
    assert any("9 of 46 images are quarantined" in line for line in said)
    assert verify(tmp_path / "c") == []
    # Reasons are part of what is compared when a build resumes, so they must be the same every time.
    build(teacher, data, CONFIG, tmp_path / "c", log=str, tolerance=LENIENT)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]), st.data())
def test_whatever_happened_to_a_file_it_is_scanned_to_the_same_one_line_every_time(tiny_dataset, kind, data):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)).save(buffer, format=kind)
    broken = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), max_size=8)):
        broken[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(broken)))

    class Broken(Damaged):
        def read(self, sample):
            return bytes(broken[:end])

    one, two = (scan_sample(Broken(tiny_dataset, {}), replace(tiny_dataset.samples[0], box=None)) for _ in range(2))
    assert one == two
    assert "\n" not in one.reason
    assert " at 0x" not in one.reason


def test_an_empty_caption_is_bad_only_where_others_have_one_and_they_are_used(tiny_dataset):
    def states(data, **options):
        return {entry.sample.id: entry.state for entry in scan(data, ["train"], **options)}

    data = damage(tiny_dataset, "blank")
    bad_one = next(iter(data.damage))
    assert [name for name, state in states(data).items() if state != "ok"] == [bad_one]
    assert set(states(data, use_captions=False).values()) == {"ok"}
    without = Damaged(tiny_dataset, {s.id: "blank" for s in tiny_dataset.samples})
    assert set(states(without).values()) == {"ok"}
    assert {entry.caption for entry in scan(without, ["train"])} == {"a photo of a bird"}


def test_strict_stops_at_the_first_bad_image_and_begins_no_cache(teacher, tiny_dataset, tmp_path):
    data = damage(tiny_dataset, "truncated", "empty")
    with pytest.raises(TooManyBadSamples, match=rf"{tiny_dataset.samples[0].source}: not a complete image"):
        build(teacher, data, CONFIG, tmp_path / "c", log=str, tolerance=Tolerance(strict=True))
    assert not (tmp_path / "c").exists()


def test_above_the_tolerated_share_the_build_stops_and_lists_five_reasons(teacher, tiny_dataset, tmp_path):
    data, seven = damage(tiny_dataset, *["missing", "empty"] * 3, "outside"), Tolerance(max_bad=7 / 46)
    with pytest.raises(TooManyBadSamples) as stopped:
        build(teacher, data, CONFIG, tmp_path / "c", log=str, tolerance=Tolerance(max_bad=6 / 46))
    message = str(stopped.value)
    assert message.startswith("7 of 46 samples are bad, more than --max-bad 13.0435%: ")
    assert message.count("the file is empty") + message.count("No such file") == 5
    assert "and 2 more" in message
    assert not (tmp_path / "c").exists()
    build(teacher, data, CONFIG, tmp_path / "c", log=str, tolerance=seven)


@settings(max_examples=50)
@given(st.integers(0, 30), st.integers(1, 30), st.floats(0, 1))
def test_as_many_as_the_share_allows_are_tolerated_and_no_more(bad, total, share):
    counted = BadSamples(Tolerance(max_bad=share), total, log=str)
    for i in range(bad):
        counted.add(f"{i}.jpg", "broken")
    if bad > share * total:
        with pytest.raises(TooManyBadSamples, match=f"{bad} of {total}"):
            counted.check()
    else:
        counted.check()


class Overflowing(FluxTeacher):
    """A FLUX whose text encoder overflows on the word `overflow`, as a half-precision one does on some prompts."""

    def encode_text(self, captions):
        text = super().encode_text(captions)
        factor = torch.tensor([math.inf if "overflow" in caption else 1.0 for caption in captions])
        return TextEmbedding(text.tokens * factor[:, None, None], text.pooled)


@pytest.fixture(scope="module")
def overflowing(flux_folder: Path) -> Overflowing:
    return Overflowing(flux_folder, resolution=32)


@pytest.fixture(scope="module")
def two_overflow(tiny_dataset):
    """Two training samples, of different shards, on which the teacher fails."""
    data = Damaged(tiny_dataset, {})
    data.samples = [
        replace(s, caption="overflow") if s.id in ("train-000-001", "train-003-004") else s for s in data.samples
    ]
    return data


def test_a_sample_on_which_the_teacher_fails_is_a_failed_row_and_harms_no_other(
    overflowing, two_overflow, tiny_dataset, teacher, tmp_path
):
    manifest = build(overflowing, two_overflow, CONFIG, tmp_path / "c", log=str, tolerance=LENIENT)
    build(teacher, tiny_dataset, CONFIG, tmp_path / "whole", log=str)
    cache, whole = open_cache(tmp_path / "c"), open_cache(tmp_path / "whole")
    failed = [cache.samples["id"].to_pylist().index(name) for name in ("train-000-001", "train-003-004")]
    assert manifest.failed_rows == failed
    assert manifest.dataset.quarantined == 0
    good = [row for row in range(26) if row not in failed]
    same = [c.read(good, tap="hidden", timesteps=[16, 28]).decode() for c in (cache, whole)]
    torch.testing.assert_close(*same)
    for row in failed:
        (found,) = read_record(LocalFolder(tmp_path / "c"), "features", row // 4).failed
        assert found.row == row
        assert found.reason.endswith("NaN or infinite: tap hidden at timestep 16, view canonical")
    assert verify(tmp_path / "c") == []


def test_strict_stops_as_soon_as_the_teacher_fails(overflowing, two_overflow, tmp_path):
    with pytest.raises(TooManyBadSamples, match=r"--strict: procedural/train-000-001.ppm: .*tap hidden at timestep 16"):
        build(overflowing, two_overflow, CONFIG, tmp_path / "c", log=str, tolerance=Tolerance(strict=True))
    assert not list((tmp_path / "c/journal").glob("features-*"))


def test_failures_of_earlier_runs_count_and_what_was_committed_stays(overflowing, two_overflow, tmp_path):
    one, both = Tolerance(max_bad=1 / 46), Tolerance(max_bad=2 / 46)
    for _ in range(2):
        with pytest.raises(TooManyBadSamples, match="2 of 46 samples are bad"):
            build(overflowing, two_overflow, CONFIG, tmp_path / "c", log=str, tolerance=one)
        # The second failure is in shard 4; what came before it is kept, and is counted by the second run.
        assert sorted(p.name for p in (tmp_path / "c/journal").glob("features-*")) == [
            f"features-{k:05d}.json" for k in range(4)
        ]
    with pytest.raises(TooManyBadSamples, match="1 of 46 samples are bad, which --strict forbids: `dit-cache info`"):
        build(overflowing, two_overflow, CONFIG, tmp_path / "c", log=str, tolerance=Tolerance(strict=True))
    assert len(build(overflowing, two_overflow, CONFIG, tmp_path / "c", log=str, tolerance=both).failed_rows) == 2


def write_cars(root: Path, broken: str) -> Path:
    """Stanford Cars in its official layout with four images, of which one is broken."""
    (root / "devkit").mkdir(parents=True)
    (root / "cars_train").mkdir()
    names = np.array([[f"Make {i}" for i in range(1, 197)]], dtype=object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    table = np.zeros((1, 4), dtype=[(name, object) for name in fields])
    for i, label in enumerate((1, 2, 100, 101)):
        table[0, i] = (1, 1, 20, 16, label, f"{i:05d}.jpg")
        Image.new("RGB", (24, 16), (label, 0, 0)).save(root / f"cars_train/{i:05d}.jpg")
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": table})
    (root / "cars_train" / broken).write_bytes(b"")
    return root


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and last line of a command."""
    with pytest.raises(SystemExit) as left:
        run(app, list(argv), name="dit-cache")
    return int(left.value.code or 0), capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_reports_bad_images_before_it_loads_the_teacher(capsys, tmp_path):
    data = write_cars(tmp_path / "cars", broken="00002.jpg")
    configured = tmp_path / "no-weights"  # as a teacher that there is looks, until it is loaded
    shutil.copytree(PRESETS["demo"].source, configured, ignore=shutil.ignore_patterns("*.safetensors"))
    options = ("build", "--dataset", "cars", "--data", str(data), "--teacher", str(configured), "--resolution", "48",
               "--taps", "hidden", "--output", str(tmp_path / "c"))  # fmt: skip
    code, said = outcome(capsys, *options, "--strict")
    assert code == 1
    assert said.startswith("error: --strict: ")
    assert "00002.jpg: the file is empty" in said
    code, said = outcome(capsys, *options)
    assert code == 1
    assert said.startswith("error: 1 of 4 samples are bad, more than --max-bad 1%: ")
    code, said = outcome(capsys, *options, "--max-bad", "25%")
    assert code == 1
    assert "no-weights" in said


@pytest.mark.parametrize("share", ["2", "101%", "-1%", "many", "nan", "%"])
def test_a_share_that_is_none_is_wrong_usage(capsys, share):
    assert outcome(capsys, "build", "--max-bad", share)[0] == 2


@pytest.mark.parametrize("option", ["--resume", "--repair"])
def test_there_must_be_a_cache_to_resume_or_repair(capsys, tmp_path, option):
    code, said = outcome(capsys, "build", option, "--output", str(tmp_path / "c"))
    assert code == 1
    assert said == f"error: {option}: there is no cache at {tmp_path / 'c'}; leave {option} out to begin one"
