"""Tests of unusable.py: the limit on the number of bad clips."""

from __future__ import annotations

import pytest

from cogvideox.data.records import OK, SHORT, ClipRecord
from cogvideox.errors import UsageError
from cogvideox.preparation.unusable import check_bad


@pytest.mark.parametrize("number", [3, 7, 29, 97, 100, 355])
def test_the_proposed_fraction_of_bad_clips_is_enough(number: int) -> None:
    for bad in range(1, number):
        records = [ClipRecord("", "p", OK)] * (number - bad) + [ClipRecord("", "p", SHORT, "r")] * bad
        with pytest.raises(UsageError) as caught:
            check_bad(records, (bad - 1) / number)
        check_bad(records, float(caught.value.problems[-1].rpartition(" ")[2]))
        with pytest.raises(UsageError):
            check_bad(records, (bad - 0.5) / number)
