"""Run all tests and write `slow_tests.txt`: those that take long, which ``-m "not slow"`` leaves out.

A test counts with its own set-up, call and tear-down, and with the longest set-up of a fixture that it shares: else the
next test of the module would pay for it. What takes long only once in a process, such as an import, is listed where it
came first, so run this twice if the tests have changed much. Nothing else should run meanwhile::

    python tests/slow_tests.py [SECONDS]
"""

import sys
from collections import Counter

import pytest

from conftest import SHARED, SLOW

_LIMIT = 0.4  # seconds on a core of its own


class Durations:
    """Seconds of each test."""

    def __init__(self):
        self.own, self.shared = Counter(), {}

    def pytest_runtest_logreport(self, report):
        self.own[report.nodeid] += report.duration
        for name, seconds in report.user_properties:
            if name == SHARED:
                self.shared[report.nodeid] = seconds


if __name__ == "__main__":
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else _LIMIT
    found = Durations()
    code = pytest.main(["-q"], plugins=[found])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(code)
    slow = sorted(name for name, own in found.own.items() if max(own, found.shared.get(name, 0.0)) > limit)
    SLOW.write_text("".join(f"{name}\n" for name in slow), encoding="utf-8")
    fast = sum(own for name, own in found.own.items() if name not in set(slow))
    print(f"{len(slow)} of {len(found.own)} tests are slow; the others take {fast:.0f} s on one core")
