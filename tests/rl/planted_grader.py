"""A grader process in which some texts do what hostile ones would: `python -m tests.rl.planted_grader FD TIMEOUT`."""

from __future__ import annotations

import mmap
import os
import signal
import sys

from mismatch_probe.rl.tasks import mathematics as grader


def right(answer: str, text: str) -> bool:
    if text == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
        signal.pause()
    if text == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "memory":
        mmap.mmap(-1, 8 << 30)  # reserved, never touched
    if text == "pid":
        return answer == str(os.getpid())
    return answer == text


if __name__ == "__main__":
    grader.right = right
    grader.main(sys.argv[1:])
