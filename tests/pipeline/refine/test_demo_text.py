"""Captions of the demo as tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets.birds import ATTRIBUTES, BirdAttributes, describe, random_attributes
from pipeline.refine.demo_text import (
    WORD_TOKENS,
    byte_level_clip_tokenizer,
    merges_of,
    word_level_clip_tokenizer,
    word_level_t5_tokenizer,
)

EVERY_WORD = {*(value for values in ATTRIBUTES.values() for value in values), "body", "wing", "crown"} | {
    "breast",
    "beak",
    "tail",
}


@pytest.mark.parametrize("tokenizer", [word_level_clip_tokenizer(), word_level_t5_tokenizer()])
def test_each_word_of_a_bird_is_one_token_and_other_words_are_spelled(tokenizer):
    for word in EVERY_WORD:
        assert len(tokenizer.tokenize(word)) == 1
    assert len(tokenizer.tokenize("Volvo")) > 3
    assert tokenizer.unk_token not in tokenizer.tokenize("Volvo 850, red")


@pytest.mark.parametrize("tokenizer", [word_level_clip_tokenizer(), word_level_t5_tokenizer()])
def test_all_that_can_be_said_of_a_bird_fits(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(20):
        caption = describe(random_attributes(rng), rng, count=7)
        assert len(tokenizer(caption).input_ids) <= WORD_TOKENS == tokenizer.model_max_length


def test_bytes_say_less():
    bird = BirdAttributes("yellow", "orange", "brown", "spotted", "streaked", "hooked", "forked")
    caption = describe(bird, np.random.default_rng(0))
    assert len(byte_level_clip_tokenizer().tokenize(caption)) > 2 * len(word_level_clip_tokenizer().tokenize(caption))


@given(st.lists(st.text("abc", min_size=1, max_size=8), unique=True))
def test_merges_join_every_word_as_byte_pair_encoding_applies_them(words):
    merges = merges_of(words)
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while ranked := [rank for rank, pair in enumerate(merges) if pair in set(pairwise(parts))]:
            first, second = merges[min(ranked)]
            at = next(i for i, pair in enumerate(pairwise(parts)) if pair == (first, second))
            parts[at : at + 2] = [first + second]
        assert parts == [word + "</w>"]


def test_every_process_cuts_a_caption_alike():
    assert word_level_clip_tokenizer().get_vocab() == word_level_clip_tokenizer().get_vocab()
