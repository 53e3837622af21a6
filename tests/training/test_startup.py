"""What a start takes is said once, part by part, from the start of the process."""

from __future__ import annotations

import re
import time

import pytest

from crate_dist.training.startup import Startup


def test_the_parts_of_a_start_add_up_and_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    startup = Startup()
    startup.mark("imports")
    time.sleep(0.3)
    startup.mark("step", ("batch", 0.1))
    startup.report()
    startup.report()
    (line,) = caplog.messages
    whole, *parts = (float(number) for number in re.findall(r"\d+\.\d", line))
    assert re.search(r"imports .*, batch 0\.1, step 0\.", line)
    assert whole == pytest.approx(sum(parts), abs=0.2)
    assert parts[0] > 0  # this process began before its first import
