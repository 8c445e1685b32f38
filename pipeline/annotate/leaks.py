"""Class names in captions: found whatever their spelling, and taken out.

A caption that names the class hands the teacher the label. The rule, for an image of class C:

1. The full name of any class of the data set is a leak (for classes other than C only where the name has a distinctive
   word: "red bird" may be said of every bird, even where it happens to be the name of one).
2. A distinctive word of C's own name is a leak. Distinctive is what is no word of the super-class, not in
   `DESCRIPTIVE` (colours, sizes, parts, patterns, places, grammar), not in more than half of the data set's class
   names (such a word is as general as the super-class), and neither a single letter nor a number below 100. Of
   `Red_winged_Blackbird` only "blackbird" is left; of `Audi TTS Coupe 2012` "audi" and "tts", because most cars of
   that data set are of 2012.
3. Case, accents, plurals, possessives and hyphens make no difference. Words written apart count where they are joined
   by a hyphen ("black-bird") or where one of them describes nothing ("humming bird"), so that "a black bird" stays
   allowed for a blackbird; name words written together count too ("landrover").

Distinctive words of *other* classes are allowed: some car is called Edge and some bird Cardinal.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.annotate.descriptive_words import DESCRIPTIVE, GRAMMAR

_TOKEN = re.compile(r"[^\W_]+(?:['’ʼ][^\W_]+)*(?:(?<=s)['’](?=[\s.,;:!?]|$))?")
_HYPHENS = frozenset("-‐‑‒–_")
# Numbering that official class lists put before a name: CUB's 001., ImageNet's n02085620-.
_NUMBERING = re.compile(r"^(?:\d+\.|n\d{8}[-_ ])")
# NABirds tells sex and age in brackets: "Common Eider (Adult male)". Nobody would say that in a sentence.
_BRACKETS = re.compile(r"\([^()]*\)")
_COMMON_SHARE = 0.5
_FEWEST_NAMES = 8  # of fewer, half may be two or three close relatives
_IRREGULAR = {"geese": "goose", "mice": "mouse"}
_LONGEST_JOIN = 4


@dataclass(frozen=True)
class _Word:
    """A word of a text: its place, its folded spelling, and what parts it from the one before: a hyphen, or blanks."""

    start: int
    end: int
    folded: str
    hyphenated: bool
    adjacent: bool


@dataclass(frozen=True)
class ClassWords:
    """What may not be said of the images of one class: spellings of single words, and names as spellings in a row."""

    words: frozenset[str]
    names: tuple[tuple[frozenset[str], ...], ...]


def fold(token: str) -> str:
    """A word without case, accents, apostrophes and possessive s."""
    # Upper case first: some letters, such as the Turkish dotless i, meet their plain form only there.
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", token).upper().casefold())
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    plain = re.sub(r"['’ʼ]s$", "", plain)
    return "".join(c for c in plain if c.isalnum())


def forms(word: str) -> frozenset[str]:
    """A folded word and what it may be the plural of; two words are the same where their forms meet."""
    found = {word, _IRREGULAR.get(word, word)}
    if len(word) > 2 and word.endswith("s"):
        found.add(word[:-1])
        if word.endswith("es"):
            found.add(word[:-2])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
        if word.endswith("ves"):
            found |= {word[:-3] + "f", word[:-3] + "fe"}
    return frozenset(found - {""})


def name_words(class_name: str) -> tuple[str, ...]:
    """The folded words of a class name, without the numbering that some data sets put before it."""
    return tuple(word.folded for word in _tokenise(_NUMBERING.sub("", class_name)))


class LeakCheck:
    """The rule of this module for one data set. class_names: of all its classes; superclass: as in `Dataset`."""

    def __init__(self, class_names: Iterable[str], superclass: str) -> None:
        self.superclass = superclass
        self._super = frozenset().union(*(forms(word) for word in name_words(superclass)))
        self._names = {name: name_words(name) for name in sorted(set(class_names)) if name_words(name)}
        counts = Counter(word for words in self._names.values() for word in set(words))
        few = max(_FEWEST_NAMES, len(self._names)) * _COMMON_SHARE
        self._common = frozenset(word for word, n in counts.items() if n > few)
        # A name with a distinctive word is forbidden to all classes; indexed, because there may be thousands.
        self._by_first: dict[str, list[tuple[frozenset[str], ...]]] = {}
        for spoken in {words for name in self._names for words in _spoken(name)}:
            if any(self.is_distinctive(word) for word in spoken):
                for form in forms(spoken[0]):
                    self._by_first.setdefault(form, []).append(_spellings(spoken))
        # Names that end in a noun of their own (… Warbler) leave a hole in a sentence; others (… Sedan) do not.
        heads = ([w for w in words if not w.isdigit()][-1:] for words in self._names.values())
        self._heads = frozenset().union(*(forms(w) for head in heads for w in head if self.is_distinctive(w)))
        self._classes: dict[str, ClassWords] = {}

    def is_distinctive(self, word: str) -> bool:
        """Say whether a folded word of a class name names the class by itself."""
        if len(word) < 2 or (word.isdigit() and len(word) < 3) or word in self._common:
            return False
        return not forms(word) & (DESCRIPTIVE | self._super)

    def class_words(self, class_name: str) -> ClassWords:
        """What may not be said of images of this class, beside the full names of the others."""
        if class_name not in self._classes:
            words = name_words(class_name)
            spellings = {word for word in words if self.is_distinctive(word)}
            for first in range(len(words)):
                for last in range(first + 2, len(words) + 1):
                    if last - first == len(words) or any(self.is_distinctive(w) for w in words[first:last]):
                        spellings.add("".join(words[first:last]))
            own = [_spellings(spoken) for spoken in sorted(_spoken(class_name))]
            names = tuple(name for name in own if not all(form & self._super for form in name))
            self._classes[class_name] = ClassWords(frozenset().union(*map(forms, spellings)), names)
        return self._classes[class_name]

    def leaks(self, caption: str, class_name: str) -> list[str]:
        """The pieces of a caption that name its class, as they are written there; empty where there are none."""
        words = _tokenise(caption)
        return [caption[words[a].start : words[b - 1].end] for a, b in self._runs(words, class_name)]

    def strip(self, caption: str, class_name: str) -> str:
        """The caption without what names its class; a caption without leaks is returned as it is.

        Where a sentence would lose a noun, the super-class takes its place. What remains may be empty.
        """
        replacement = self.superclass
        while runs := self._runs(words := _tokenise(caption), class_name):
            caption = self._without(caption, words, runs, replacement)
            # The super-class next to what was left may spell a name: it is put in once, so that this ends.
            replacement = ""
        return caption

    def _runs(self, words: Sequence[_Word], class_name: str) -> list[tuple[int, int]]:
        """Word ranges to take out, apart from each other and in order, whole hyphenated compounds."""
        own = self.class_words(class_name)
        spelled = [forms(word.folded) for word in words]
        hits = [bool(form & own.words) for form in spelled]
        for start in range(len(words)):
            for end in self._ends(words, spelled, start, own):
                hits[start:end] = [True] * (end - start)
        runs: list[tuple[int, int]] = []
        for i, hit in enumerate(hits):
            if not hit:
                continue
            first, last = i, i + 1
            while first > 0 and words[first].hyphenated:
                first -= 1
            while last < len(words) and words[last].hyphenated:
                last += 1
            if runs and (first <= runs[-1][1] and words[first].adjacent):
                runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
            else:
                runs.append((first, last))
        return runs

    def _ends(
        self, words: Sequence[_Word], spelled: Sequence[frozenset[str]], start: int, own: ClassWords
    ) -> Iterable[int]:
        """Where names, or distinctive words written apart, end that begin at a word."""
        names = [*own.names, *(name for form in spelled[start] for name in self._by_first.get(form, ()))]
        for name in names:
            end = start + len(name)
            if end <= len(words) and all(a & b for a, b in zip(name, spelled[start:end], strict=True)):
                yield end
        joined, loose = words[start].folded, not self._is_ordinary(spelled[start])
        for end in range(start + 2, min(start + _LONGEST_JOIN, len(words)) + 1):
            word = words[end - 1]
            joined += word.folded
            loose = loose or not self._is_ordinary(spelled[end - 1])
            if not word.adjacent:
                return
            if forms(joined) & own.words and (loose or all(w.hyphenated for w in words[start + 1 : end])):
                yield end

    def _is_ordinary(self, word_forms: frozenset[str]) -> bool:
        return bool(word_forms & (DESCRIPTIVE | self._super))

    def _without(self, caption: str, words: Sequence[_Word], runs: Sequence[tuple[int, int]], replacement: str) -> str:
        parts, done = [], 0
        for first, last in runs:
            before = caption[done : words[first].start]
            following = words[last].folded if last < len(words) and words[last].adjacent else ""
            preceding = words[first - 1].folded if first and words[first].adjacent else ""
            ending = {"".join(w.folded for w in words[k:last]) for k in range(first, last)}
            has_noun = any(forms(word) & self._heads for word in ending)
            bracketed = before.rstrip().endswith("(")
            needs_noun = not bracketed and (has_noun or not following or following in GRAMMAR)
            beside = bool((forms(following) | forms(preceding)) & self._super)
            noun = replacement if needs_noun and not beside else ""
            parts += [_with_article(before, noun or following), noun or " "]
            done = words[last - 1].end
        text = _tidy("".join(parts) + caption[done:])
        return text[:1].upper() + text[1:] if caption[:1].isupper() else text


def _tokenise(text: str) -> list[_Word]:
    words: list[_Word] = []
    end = 0
    for match in _TOKEN.finditer(text):
        folded = fold(match.group())
        if not folded:
            continue
        gap = text[end : match.start()] if words else ","
        hyphenated = gap in _HYPHENS
        words.append(_Word(match.start(), match.end(), folded, hyphenated, hyphenated or gap.isspace()))
        end = match.end()
    return words


def _spoken(class_name: str) -> set[tuple[str, ...]]:
    """The class name in words, with and without what it has in brackets."""
    return {words for words in (name_words(class_name), name_words(_BRACKETS.sub(" ", class_name))) if words}


def _spellings(words: Sequence[str]) -> tuple[frozenset[str], ...]:
    return tuple(forms(word) for word in words)


def _with_article(before: str, following: str) -> str:
    """Make a final "a" or "an" fit the word that now follows it."""
    match = re.search(r"\b(an?)(\s+)$", before, flags=re.IGNORECASE)
    if not match or not following:
        return before
    article = match[1][0] + ("n" if following[0] in "aeiou" else "")
    return before[: match.start()] + article + match[2]


def _tidy(text: str) -> str:
    """Close the gaps that words leave behind: doubled blanks and commas, empty brackets and quotes."""
    text = re.sub(r"\(\s*\)|\[\s*\]|\"\s*\"|“\s*”", " ", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,;:.!?])", r"\1", text)
    text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
    text = re.sub(r"[,;:]+(?=[.!?])", "", text)
    return re.sub(r"^[\s,;:.!?]+", "", text).rstrip()
