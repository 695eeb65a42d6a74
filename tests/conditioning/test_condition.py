"""Rows of a condition are mixed together, field by field."""

import pytest
import torch

from ldm.conditioning import Condition
from ldm.errors import UserError


def full(start: int, n: int) -> Condition:
    rows = torch.arange(start, start + n)
    return Condition(
        tokens=rows.view(n, 1, 1).expand(n, 3, 2).float(),
        mask=(rows % 2 == 0).view(n, 1).expand(n, 3),
        vector=rows.view(n, 1).expand(n, 4).float(),
        concat=rows.view(n, 1, 1, 1).expand(n, 1, 2, 2).float(),
    )


def assert_rows(condition: Condition, rows: list[int]) -> None:
    assert condition.tokens[:, 0, 0].tolist() == rows
    assert condition.mask[:, 0].tolist() == [row % 2 == 0 for row in rows]
    assert condition.vector[:, 0].tolist() == rows
    assert condition.concat[:, 0, 0, 0].tolist() == rows


def test_where_acts_on_rows_of_every_field():
    drop = torch.tensor([False, True, True])
    assert_rows(full(0, 3).where(drop, full(7, 3)), [0, 8, 9])
    assert_rows(full(0, 3).where(drop, full(7, 1)), [0, 7, 7])


def test_inputs_are_the_fields_that_are_present():
    condition = Condition(tokens=torch.zeros(2, 3, 4))
    assert list(condition.inputs()) == ["tokens"]
    assert Condition().inputs() == {}


def test_to_changes_floating_point_fields_only():
    moved = full(0, 2).to(torch.device("cpu"), torch.bfloat16)
    assert moved.tokens.dtype == moved.vector.dtype == moved.concat.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool


def test_conditions_with_different_fields_are_not_mixed():
    tokens, drop = torch.zeros(1, 2, 3), torch.tensor([True])
    with pytest.raises(UserError, match="tokens and tokens, vector"):
        Condition(tokens=tokens).where(drop, Condition(tokens=tokens, vector=torch.zeros(1, 3)))
    with pytest.raises(UserError, match="tokens and none"):
        Condition(tokens=tokens).where(drop, Condition())


def test_fields_of_different_batch_sizes_are_refused():
    with pytest.raises(UserError, match="one batch size"):
        Condition(tokens=torch.zeros(2, 3, 4), vector=torch.zeros(3, 4))
