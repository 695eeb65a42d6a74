"""Rows of a condition are cut, joined and mixed together, field by field."""

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
    assert len(condition) == len(rows)
    assert condition.tokens[:, 0, 0].tolist() == rows
    assert condition.mask[:, 0].tolist() == [row % 2 == 0 for row in rows]
    assert condition.vector[:, 0].tolist() == rows
    assert condition.concat[:, 0, 0, 0].tolist() == rows


def test_cat_select_and_where_act_on_rows_of_every_field():
    assert_rows(Condition.cat([full(0, 2), full(5, 1)]), [0, 1, 5])
    assert_rows(full(0, 4).select(torch.tensor([3, 0, 0])), [3, 0, 0])
    drop = torch.tensor([False, True, True])
    assert_rows(full(0, 3).where(drop, full(7, 3)), [0, 8, 9])
    assert_rows(full(0, 3).where(drop, full(7, 1)), [0, 7, 7])


def test_inputs_are_the_fields_that_are_present():
    condition = Condition(tokens=torch.zeros(2, 3, 4))
    assert list(condition.inputs()) == ["tokens"]
    assert len(condition) == 2
    assert Condition().inputs() == {} and len(Condition()) == 0


def test_to_changes_floating_point_fields_only():
    moved = full(0, 2).to(dtype=torch.bfloat16)
    assert moved.tokens.dtype == moved.vector.dtype == moved.concat.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool


def test_cat_names_the_field_that_is_missing():
    tokens = torch.zeros(1, 2, 3)
    with pytest.raises(UserError, match="vector in some but not in all"):
        Condition.cat([Condition(tokens=tokens), Condition(tokens=tokens, vector=torch.zeros(1, 3))])
    with pytest.raises(UserError, match="tokens in some"):
        Condition(tokens=tokens).where(torch.tensor([True]), Condition())
    with pytest.raises(UserError, match="at least one"):
        Condition.cat([])


def test_fields_of_different_batch_sizes_are_refused():
    with pytest.raises(UserError, match="one batch size"):
        Condition(tokens=torch.zeros(2, 3, 4), vector=torch.zeros(3, 4))
