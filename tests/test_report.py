"""The report of a conversion."""

from __future__ import annotations

from kconv._report import Report


def test_table():
    report = Report("accelerate", {"a": "one", "long.name": "another"}, {"b": "its reason"})
    assert str(report).splitlines() == [
        "accelerate: 2 changed, 1 kept",
        "  changed  a          one",
        "  changed  long.name  another",
        "  kept     b          its reason",
    ]


def test_nothing_to_report():
    assert str(Report("restore", {}, {})) == "restore: 0 changed, 0 kept"
