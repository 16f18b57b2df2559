"""The reference itself, on numbers that can be checked by hand."""

import numpy as np

from tfprivacy_ft.clipping import reference


def test_clips_over_all_variables_together():
    each = [[np.array([3.0]), np.array([4.0])], [np.array([0.3]), np.array([0.4])]]
    total = reference.clipped_sum(each, 1.0)
    np.testing.assert_allclose([total[0][0], total[1][0]], [0.6 + 0.3, 0.8 + 0.4])


def test_zero_gradient_stays_zero():
    assert reference.clipped_sum([[np.zeros(2)]], 1.0)[0].tolist() == [0.0, 0.0]
