"""The bench's arithmetic and its table: what is written must be what was measured."""

from __future__ import annotations

import pytest
from bench.report import markdown
from bench.series import Figure, percentile, written


def test_percentiles() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [percentile(values, name) for name in ("min", "p50", "max", "p75")] == [1, 3, 5, 4]
    assert percentile([1.0, 2.0], "p50") == 1.5
    assert percentile([7.0], "p99") == 7
    with pytest.raises(ValueError, match="no values"):
        percentile([], "p50")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234.0, "ms", "1.23 s"),
        (21.04, "ms", "21.0 ms"),
        (0.4504, "ms", "0.450 ms"),
        (250.0, "ms", "250 ms"),
        (55.94, "MiB", "55.9 MiB"),
        (0.0, "", "0"),
        (None, "ms", "–"),
    ],
)
def test_written_as_people_read_it(value: float | None, unit: str, text: str) -> None:
    assert written(value, unit) == text


def test_a_figure_misses_when_its_statistic_does() -> None:
    figure = Figure("pause", "pause", statistic="p99", reach=150)
    assert figure.verdict == "not measured"
    figure.values = [10.0] * 50
    assert figure.verdict == "reached"
    figure.values.append(9000)
    assert figure.verdict == "MISSED"


def test_a_block_that_fails_is_no_value() -> None:
    figure = Figure("x", "x")
    with pytest.raises(KeyError), figure.timed():
        raise KeyError
    assert figure.values == []
    with figure.timed():
        pass
    assert len(figure.values) == 1


def test_the_table_has_a_line_for_each_figure() -> None:
    first = Figure("a", "first thing", reach=100, peers={"peer": "peer 42 ms"}, note="of two parts", values=[50.0, 70.0])
    second = Figure("b", "second thing", values=[1500.0])
    facts = dict.fromkeys(("posada", "processor", "memory", "system", "qemu", "python", "load"), "?")
    text = markdown([first, second], facts, "tcg", "2026-01-02")
    assert "| first thing | p50 ≤ 100 ms | 60 ms | 50 ms – 69.8 ms | 2 | reached | peer 42 ms |" in text
    assert "| second thing |  | 1.50 s |  | 1 |  |  |" in text
    assert "- **first thing**: of two parts" in text
