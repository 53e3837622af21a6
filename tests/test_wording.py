"""Sizes, times and shares are said in one way, at the edges of their units too."""

from __future__ import annotations

import pytest

from crate_dist.wording import aligned, counted, duration, share, size


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1.5e9, "1.5 GB"),
        (41.2e12, "41.2 TB"),
        (2.5e16, "25 PB"),
    ],
)
def test_sizes(count: float, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3, "0 s"),
        (0.04, "0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (2 * 3600 + 5 * 60 + 59, "2 h 05 min"),
        (76 * 3600, "3 d 04 h"),
    ],
)
def test_times(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("fraction", "said"), [(0, "0 %"), (0.0234, "2.3 %"), (0.0996, "10 %"), (0.384, "38 %"), (1, "100 %")]
)
def test_shares(fraction: float, said: str) -> None:
    assert share(fraction) == said


def test_counts_and_tables() -> None:
    assert [counted(n, "class", "classes") for n in (1, 1282)] == ["1 class", "1,282 classes"]
    assert aligned([("run", "top-1"), ("a", 61.2)]) == ["run  top-1", "a    61.2"]
