"""tools/dataset_checks.py: the R@1 ceiling of captions that several identities share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.dataset_checks import r1_ceiling


def test_the_ceiling_of_r1_by_hand() -> None:
    assert r1_ceiling([("a", 1), ("b", 2), ("b", 2)]) == 100
    assert r1_ceiling([("a", 1), ("a", 2)]) == 50
    # "a" belongs to ids 1, 1, 2, 3 and loses two queries; "b" belongs to ids 1, 2 and loses one: 3 of 8 are lost.
    queries = [("a", 1), ("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("c", 1), ("d", 4)]
    assert r1_ceiling(queries) == 62.5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=12))
def test_the_ceiling_of_r1_is_the_best_choice_of_one_identity_per_text(queries: list[tuple[str, int]]) -> None:
    right = sum(max(queries.count((text, pid)) for pid in range(4)) for text in "abc")
    assert r1_ceiling(queries) == pytest.approx(100 * right / len(queries))
