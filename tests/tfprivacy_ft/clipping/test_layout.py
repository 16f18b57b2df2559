"""The reshape rule, on which the proof of isolation rests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfprivacy_ft.clipping.layout import Rows, axis_after_reshape


@given(
    batch=st.integers(2, 5),
    before=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    after=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_a_claimed_axis_never_mixes_examples(batch, before, after):
    source, size = [batch, *before], batch * int(np.prod(before))
    inner = int(np.prod(after))
    target = [size // inner, *after] if size % inner == 0 else source
    rows = axis_after_reshape(source, target, Rows(0))
    if rows is None:
        return
    owner = np.broadcast_to(np.arange(batch).reshape(-1, *[1] * len(before)), source).reshape(target)
    by_row = np.moveaxis(owner, rows.axis, 0).reshape(target[rows.axis], -1)
    assert target[rows.axis] == batch * rows.fold
    expected = np.repeat(np.arange(batch), rows.fold)[:, None]
    np.testing.assert_array_equal(by_row, np.broadcast_to(expected, by_row.shape))


@pytest.mark.parametrize(
    ("before", "after", "rows", "expected"),
    [
        ([7, 6, 4], [42, 4], Rows(0), Rows(0, 6)),
        ([42, 4], [7, 6, 4], Rows(0, 6), Rows(0, 1)),
        ([7, 6, 4], [1, 42, 4, 1], Rows(0), Rows(1, 6)),
        ([7, 6, 4], [6, 28], Rows(0), None),
        ([6, 7], [42], Rows(1), None),
    ],
)
def test_known_reshapes(before, after, rows, expected):
    assert axis_after_reshape(before, after, rows) == expected
