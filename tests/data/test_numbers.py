"""Numbers in JSON parts as columns."""

import json
import math
from typing import Any

import numpy as np
import pytest

from ldm.data.shards.numbers import Numbers, number


def columns(rows: list[dict[str, Any]], kept: list[int] | None = None) -> dict[str, list[float]]:
    numbers = Numbers()
    for row in rows:
        numbers.add(json.loads(json.dumps(row)))
    found = numbers.columns(range(len(rows)) if kept is None else kept)
    assert all(column.dtype == np.float64 for column in found.values())
    return {name: column.tolist() for name, column in found.items()}


def test_numbers_and_truths_are_kept_and_gaps_are_nan() -> None:
    found = columns([{"a": 1, "b": True}, {"a": 2.5, "b": None, "c": [1]}, {"b": False, "c": {"d": 1}}])
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"], [1, 2.5, np.nan])
    np.testing.assert_array_equal(found["b"], [1, np.nan, 0])


def test_strings_that_are_numbers_count() -> None:
    found = columns([{"s": "0.25"}, {"s": "-1e3"}, {"s": ""}, {"s": "None"}, {"s": 4}])
    np.testing.assert_array_equal(found["s"], [0.25, -1000, np.nan, np.nan, 4])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_strings_of_a_name_with_words_do_not(order: list[int]) -> None:
    rows = [{"s": "2012"}, {"s": "a picture of 2012"}, {"s": 7}]
    found = columns([rows[i] for i in order])
    np.testing.assert_array_equal(found["s"], [7.0 if i == 2 else np.nan for i in order])
    assert columns([{"s": "2012"}, {"s": "words"}]) == {}


def test_captions_keys_and_sides_are_no_columns() -> None:
    assert columns([{"caption": "12", "key": "000012", "width": 3, "height": 4}]) == {}


def test_only_kept_rows_make_columns() -> None:
    found = columns([{"a": 1}, {"b": "2"}, {"a": 3}], kept=[2])
    assert found == {"a": [3.0]}


def test_a_number_is_what_reads_as_one() -> None:
    assert [number(value) for value in (3, 2.5, True, "7", " 8 ", "1e3", "-.5")] == [3, 2.5, 1, 7, 8, 1000, -0.5]
    assert all(math.isnan(number(value)) for value in (None, "", "1_0", "0x10", "inf", "nan", [], 10**400, "\u0663"))
