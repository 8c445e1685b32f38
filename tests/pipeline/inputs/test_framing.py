"""Random crops of what the teacher sees: where they lie, and on what that depends."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cache_schema.errors import DitDistillError
from pipeline.inputs.framing import Framing
from pipeline.inputs.views import expand_views

sides = st.integers(8, 5000)
shares = st.floats(0, 1)


@given(st.tuples(sides, sides), st.tuples(shares, shares, shares, shares), st.sampled_from(["object", "image"]),
       st.integers(0, 3), st.text(max_size=5))  # fmt: skip
def test_a_crop_lies_in_what_the_teacher_sees_and_has_a_share_of_its_area(size, edges, shown, k, name):
    (width, height), (x0, x1), (y0, y1) = size, sorted(edges[:2]), sorted(edges[2:])
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    assume(box[2] - box[0] >= 4 and box[3] - box[1] >= 4)
    framing = Framing(shown, seed=1, scale=(0.3, 0.6), ratio=(0.5, 2))
    left, top, right, bottom = framing.crop(name, f"crop.{k}", size, box)
    outer = (0, 0, width, height) if shown == "image" else box
    inner = (left * width, top * height, right * width, bottom * height)
    assert all(a >= b - 0.01 for a, b in zip(inner[:2], outer[:2], strict=True))
    assert all(a <= b + 0.01 for a, b in zip(inner[2:], outer[2:], strict=True))
    w, h = inner[2] - inner[0], inner[3] - inner[1]
    whole_w, whole_h = outer[2] - outer[0], outer[3] - outer[1]
    assert w * h <= 0.6 * whole_w * whole_h * 1.01 or min(w, h) < 1.1
    uncut = w < whole_w - 0.02 and h < whole_h - 0.02 and min(w, h) > 1.1
    assert not uncut or 0.29 * whole_w * whole_h <= w * h
    assert not uncut or 0.49 <= w / h <= 2.04
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1


def test_a_crop_depends_on_seed_id_and_number_alone():
    box = (0.0, 0.0, 100.0, 80.0)

    def crop(seed=0, name="a", view="crop.0"):
        return Framing(seed=seed).crop(name, view, (100, 80), box)

    assert crop() == crop()
    assert len({crop(), crop(seed=1), crop(name="b"), crop(view="crop.1")}) == 4
    assert all(math.isfinite(edge) for edge in crop())


def test_crops_are_named_by_their_number_once():
    assert expand_views(("canonical", "crops:2")) == ("canonical", "crop.0", "crop.1")
    assert expand_views(expand_views(("crops:3", "hflip"))) == ("crop.0", "crop.1", "crop.2", "hflip")
    for wrong in ("crops:0", "crops:65", "crops", "crop.1", "middle", "canonical,canonical", "crops:2,crop.0", ""):
        with pytest.raises(DitDistillError, match=r"--views .*name one or more of canonical, hflip and crops:K"):
            expand_views(tuple(filter(None, wrong.split(","))))
