"""No caption names its class, however it is spelled; descriptions stay as they are."""

import random

import pytest
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotate.descriptive_words import DESCRIPTIVE
from pipeline.annotate.leaks import LeakCheck, fold, forms, name_words

BIRDS = [
    "001.Black_footed_Albatross", "Red_winged_Blackbird", "Brewer Blackbird", "Yellow Warbler", "Hooded Warbler",
    "House Wren", "Cardinal", "Chuck_will_Widow", "Ruby-throated Hummingbird", "Gray Catbird", "Ovenbird",
    "American Crow", "Fish Crow", "Dark-eyed Junco (White-winged)", "Common Eider (Adult male)", "Painted Bunting",
    "Geococcyx", "Canada Goose", "Bewick's Wren", "Horned Puffin",
]  # fmt: skip
CARS = [
    "Audi TT Hatchback 2011", "Audi TTS Coupe 2012", "Ford Edge SUV 2012", "Land Rover LR2 SUV 2012",
    "Rolls-Royce Ghost Sedan 2012", "BMW 3 Series Sedan 2012", "smart fortwo Convertible 2012", "Citroën C4 Sedan 2012",
    "Fiat 500 Abarth 2012", "Dodge Caliber Wagon 2007", "MINI Cooper Roadster Convertible 2012", "Ram C/V Van 2012",
]  # fmt: skip
CHECKS = {"bird": (LeakCheck(BIRDS, "bird"), BIRDS), "car": (LeakCheck(CARS, "car"), CARS)}
birds, cars = CHECKS["bird"][0], CHECKS["car"][0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("001.Black_footed_Albatross", {"albatross"}),
        ("Red_winged_Blackbird", {"blackbird"}),
        ("House Wren", {"wren"}),
        ("Common Eider (Adult male)", {"eider"}),
        ("Bewick's Wren", {"bewick", "wren"}),
        ("Geococcyx", {"geococcyx"}),
    ],
)
def test_colours_parts_places_and_sexes_are_not_what_makes_a_name(name, expected):
    assert {word for word in name_words(name) if birds.is_distinctive(word)} == expected


def test_makers_models_and_rare_years_are_distinctive_and_body_styles_are_not():
    distinctive = {name: {w for w in name_words(name) if cars.is_distinctive(w)} for name in CARS}
    assert distinctive["Audi TTS Coupe 2012"] == {"audi", "tts"}  # 2012 is in most names
    assert distinctive["Dodge Caliber Wagon 2007"] == {"dodge", "caliber", "2007"}
    assert distinctive["BMW 3 Series Sedan 2012"] == {"bmw"}


def test_a_word_of_most_class_names_tells_no_class_apart():
    dogs = LeakCheck(
        [f"{n} Retriever" for n in ("Labrador", "Nova", "Curly", "Flat", "Golden", "Bay", "Toll", "Duck")], "dog"
    )
    assert dogs.leaks("a retriever with a curly coat", "Labrador Retriever") == []
    assert dogs.leaks("a labrador with a curly coat", "Labrador Retriever") == ["labrador"]


@pytest.mark.parametrize(
    ("caption", "name", "found"),
    [
        ("A Brewer's blackbird.", "Brewer Blackbird", ["Brewer's blackbird"]),
        ("two BLACKBIRDS", "Red_winged_Blackbird", ["BLACKBIRDS"]),
        ("the Blackbirds' wings", "Red_winged_Blackbird", ["Blackbirds'"]),
        ("a black-bird on a reed", "Red_winged_Blackbird", ["black-bird"]),
        ("a black bird with red wings", "Red_winged_Blackbird", []),
        ("a red-winged bird", "Red_winged_Blackbird", []),
        ("a humming bird, ruby throated", "Ruby-throated Hummingbird", ["humming bird"]),
        ("a warbler-like bill", "Yellow Warbler", ["warbler-like"]),
        ("looks like a House Wren", "Yellow Warbler", ["House Wren"]),
        ("a house behind it", "House Wren", []),
        ("an edge of chrome", "Ford Edge SUV 2012", ["edge"]),
        ("an edge of chrome", "Audi TT Hatchback 2011", []),
        ("a LandRover", "Land Rover LR2 SUV 2012", ["LandRover"]),
        ("a rolls royce", "Rolls-Royce Ghost Sedan 2012", ["rolls royce"]),
        ("a Citroen", "Citroën C4 Sedan 2012", ["Citroen"]),
        ("a row of Canada geese", "Canada Goose", ["Canada geese"]),
        ("a dark-eyed junco", "House Wren", ["dark-eyed junco"]),
        ("a small sedan with 4 doors and 3 windows", "BMW 3 Series Sedan 2012", []),
        ("", "House Wren", []),
    ],
)
def test_names_are_found_as_people_write_them(caption, name, found):
    check = cars if name in CARS else birds
    assert check.leaks(caption, name) == found


@pytest.mark.parametrize(
    ("caption", "name", "stripped"),
    [
        ("A small Brewer's blackbird with a yellow eye.", "Brewer Blackbird", "A small bird with a yellow eye."),
        ("An Audi TT coupe; the Audi's grille is black.", "Audi TT Hatchback 2011", "A coupe; the grille is black."),
        ("An oven-bird, olive above.", "Ovenbird", "A bird, olive above."),
        ("This cardinal bird (Cardinal) is red.", "Cardinal", "This bird is red."),
        ("Red, black, Ovenbird, white.", "Ovenbird", "Red, black, bird, white."),
        ("Ovenbird", "Ovenbird", "Bird"),
        ("Audi TT", "Audi TT Hatchback 2011", "Car"),
    ],
)
def test_names_are_taken_out_and_a_sentence_remains(caption, name, stripped):
    check = cars if name in CARS else birds
    assert check.strip(caption, name) == stripped


def test_a_name_made_of_descriptive_words_is_a_leak_for_its_own_class_only():
    check = LeakCheck(["red-black-plain", "red", "blue-grey-spotted"], "bird")
    assert check.leaks("a red black plain bird", "red-black-plain") == ["red black plain"]
    assert check.leaks("a red black plain bird", "blue-grey-spotted") == []
    assert check.strip("a red bird", "red") == "a bird"


def test_an_image_without_a_class_may_not_be_given_the_name_of_one():
    assert birds.strip("a yellow warbler on a branch", "") == "a bird on a branch"
    assert birds.leaks("a warbler on a branch", "") == []


FILLERS = sorted(w for w in DESCRIPTIVE if w.isalpha())


@st.composite
def spelled_names(draw):
    """A class of one of the data sets and its name, or a distinctive word of it, as somebody might write it."""
    superclass = draw(st.sampled_from(sorted(CHECKS)))
    check, names = CHECKS[superclass]
    name = draw(st.sampled_from(names))
    distinctive = [w for w in name_words(name) if check.is_distinctive(w)]
    written = list(name_words(name)) if draw(st.booleans()) else [draw(st.sampled_from(distinctive))]
    text = draw(st.sampled_from([" ", "-", "_", "  "])).join(written)
    last = written[-1]
    plural = last[:-1] + "ies" if last.endswith("y") else last + ("es" if last[-1] in "shx" else "s")
    text = text.removesuffix(last) + draw(st.sampled_from([last, plural, last + "'s", last + "’s", plural + "'"]))
    change = draw(st.sampled_from([str.upper, str.title, str.lower, str.swapcase]))
    return check, name, change(text)


@many_examples
@given(spelled_names(), st.lists(st.sampled_from(FILLERS), max_size=6), st.lists(st.sampled_from(FILLERS), max_size=6))
def test_every_spelling_is_found_between_any_words_and_nothing_of_it_stays(spelled, before, after):
    check, name, text = spelled
    caption = " ".join([*before, text, *after])
    assert check.leaks(caption, name)
    stripped = check.strip(caption, name)
    assert check.leaks(stripped, name) == []
    remaining = set(name_words(stripped))
    assert set(after) <= remaining  # what described the bird before and after still does
    assert set(before) - {"a", "an"} <= remaining | {check.superclass}


@many_examples
@given(st.text(max_size=200), st.sampled_from([(c, n) for c, names in CHECKS.values() for n in names]))
def test_any_text_can_be_checked_and_stripped(text, chosen):
    check, name = chosen
    stripped = check.strip(text, name)
    assert check.leaks(stripped, name) == []
    assert check.strip(stripped, name) == stripped
    if not check.leaks(text, name):
        assert stripped == text


@many_examples
@given(st.integers(0, 2**32), st.sampled_from(BIRDS))
def test_no_description_in_plain_words_is_touched(seed, name):
    words = random.Random(seed).choices(FILLERS, k=20)
    # Commas, so that the words of a name do not stand side by side by chance.
    caption = ", ".join(words)
    assert birds.leaks(caption, name) == []


@many_examples
@given(st.text(st.characters(categories=["Ll"], max_codepoint=0x17F), min_size=3, max_size=12))
def test_a_word_is_met_by_its_plurals_and_possessives(word):
    base = fold(word)
    for other in (word + "s", word + "es", word + "'s", word.upper(), word + "S"):
        assert forms(fold(other)) & forms(base), other
    if base.endswith("y"):
        assert forms(base[:-1] + "ies") & forms(base)
