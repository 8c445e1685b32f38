"""Labels in a table: the same classes from CSV, JSON lines and Parquet, whatever a table library made of numbers."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from pipeline.datasets.base import DataError
from pipeline.datasets.class_names import plain_class_name
from pipeline.datasets.image_rows import Row, text_of

_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?")
_WITH_ZEROS = re.compile(r"([+-]?[0-9]+)\.0*")
# What pandas takes for a missing value when it reads a CSV file, and writes as none into Parquet.
_NO_VALUE = frozenset(
    {
        "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na", "nan",
        "nat", "none", "null",
    }
)  # fmt: skip
_INFINITE = frozenset({"inf", "infinity"})
_LARGEST_EXPONENT = 18  # beyond, a number with an exponent is nobody's class


def label_texts(rows: Sequence[tuple[str, Row]], column: str) -> list[str | None]:
    """The class names in a column of a table, one per row, None where it is blank.

    Where all values are numbers, `3.0` is `3`: table libraries make floats of whole numbers as soon as one is missing.
    Raises DataError naming the line of a value that is no text and no number, that stands for a missing one (`nan`),
    or that is the number of another class written otherwise (`7` and `07`, `1` and `1.0` among words).
    """
    texts: list[str | None] = []
    for where, row in rows:
        try:
            texts.append(_text(row.get(column), column))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
    numbers = [Decimal(text) if text is not None and _NUMBER.fullmatch(text) else None for text in texts]
    if all(number is not None for number, text in zip(numbers, texts, strict=True) if text is not None):
        texts = [_without_zeros(text) if text is not None else None for text in texts]
    first: dict[Decimal, tuple[str | None, str]] = {}
    for (where, _), text, number in zip(rows, texts, numbers, strict=True):
        if number is None:
            continue
        other, line = first.setdefault(number, (text, where))
        if other != text:
            raise DataError(
                f"{where}: {column} {text!r} and {other!r} ({line}) are one number written in two ways; are they one "
                "class? Write each class in one way"
            )
    return texts


def _text(value: Any, column: str) -> str | None:
    if isinstance(value, float):
        # As a CSV file would have it, so that the rule above is the same for all.
        value = None if math.isnan(value) else repr(value)
    text = text_of({column: value}, column)
    if text is None:
        return None
    if text.casefold().lstrip("+-") in _INFINITE:
        raise ValueError(f"{column} is not finite; expected the name or number of a class")
    if text.casefold() in _NO_VALUE:
        raise ValueError(
            f"{column} {text!r} is what table libraries write for a missing value; leave it empty if the image has no "
            "class, or call the class something else"
        )
    return plain_class_name(text) or None


def _without_zeros(text: str) -> str:
    """`3.0` and `3.` as `3`, `1e3` as `1000`; other numbers as they are."""
    if whole := _WITH_ZEROS.fullmatch(text):
        return whole[1]
    number = Decimal(text)
    if "e" in text.lower() and number.adjusted() <= _LARGEST_EXPONENT and number == number.to_integral_value():
        return str(int(number))
    return text
