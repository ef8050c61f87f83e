"""The learning rate, against values worked out by hand."""

import pytest

from dsft.training.optimizer import learning_rate_factor as factor


def test_the_warmup_rises_linearly_from_the_first_step_to_the_peak():
    assert [factor(step, 4, 100, "cosine", 0.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert [factor(0, 0, 10, kind, 0.0) for kind in ("cosine", "linear", "constant")] == [1.0, 1.0, 1.0]


def test_cosine_falls_over_a_half_wave():
    # progress 0, 1/4, 1/2, 3/4: (1 + cos(pi p)) / 2
    got = [factor(step, 2, 10, "cosine", 0.0) for step in (2, 4, 6, 8)]
    assert got == pytest.approx([1.0, 0.8535533905932737, 0.5, 0.14644660940672627], abs=1e-12)


def test_linear_falls_in_equal_parts():
    assert [factor(step, 2, 10, "linear", 0.0) for step in (2, 4, 6, 8)] == [1.0, 0.75, 0.5, 0.25]


def test_constant_stays_at_the_peak():
    assert [factor(step, 2, 10, "constant", 0.3) for step in (2, 5, 9, 10, 99)] == [1.0] * 5


def test_the_least_rate_is_a_share_of_the_peak():
    assert [factor(step, 0, 4, "linear", 0.2) for step in (0, 1, 2, 3, 4)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert factor(2, 0, 4, "cosine", 0.2) == pytest.approx(0.6)
    assert factor(4, 0, 4, "cosine", 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(("kind", "end"), [("cosine", 0.1), ("linear", 0.1)])
def test_after_the_last_step_the_rate_stays_where_it_ended(kind, end):
    assert [factor(step, 1, 5, kind, 0.1) for step in (5, 6, 50)] == pytest.approx([end] * 3)


def test_a_warmup_as_long_as_the_run_ends_at_the_peak():
    assert [factor(step, 3, 3, "cosine", 0.0) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
