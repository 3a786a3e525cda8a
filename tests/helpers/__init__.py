"""Functions and constants that several test files share."""

import pytest

pytest.register_assert_rewrite("tests.helpers.golden", "tests.helpers.runs", "tests.helpers.steps")
