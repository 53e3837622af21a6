"""The end of a rank is told in a sentence: its own reason, and where its log of this start begins."""

from __future__ import annotations

from pathlib import Path

from crate_dist.launching.ranks import _explain

BEFORE = "step 1\nerror: what another job said\n" * 10


def explained(tmp_path: Path, status: int, said: str) -> str:
    log = tmp_path / "rank-00001.log"
    log.write_text(BEFORE + said)
    return str(_explain(1, status, log, len(BEFORE))).replace(str(log), "LOG")


def test_its_own_sentence_is_told_and_nothing_of_the_jobs_before(tmp_path: Path) -> None:
    said = explained(tmp_path, 1, "step 7\nerror: the disk is full\nTerminated\n")
    assert said == (
        "rank 1 ended with exit status 1 (the disk is full), so the others were ended; "
        "what it said stands in LOG from line 21 on"
    )
    trace = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\nKeyError: 7\nleft the group\n'
    assert "exit status 75 (KeyError: 7)," in explained(tmp_path, 75, trace)
    assert "exit status 3 (nothing known)," in explained(tmp_path, 3, "step 7\nnothing known\n")


def test_a_rank_that_was_killed_and_said_nothing_is_not_given_the_words_of_another_job(tmp_path: Path) -> None:
    assert "killed by SIGKILL (by somebody, or by the kernel for want of memory" in explained(tmp_path, -9, "step 7\n")
    assert "killed by SIGSEGV, so the others" in explained(tmp_path, -11, "")
