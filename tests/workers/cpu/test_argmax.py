"""The team that looks for the best tokens is the step's: its threads live on, whatever the number of rows."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os, torch
from headwise.workers.cpu.argmax import argmax

def threads_after(rows):
    logits = torch.rand(rows, 1000)
    assert torch.equal(argmax(logits, 4), logits.argmax(-1))
    return set(os.listdir("/proc/self/task"))

alone, team = threads_after(1), threads_after(8)
print(len(team - alone), [rows for rows in (2, 8, 3, 8, 1, 8, 5, 8) if threads_after(rows) != team])
"""


def test_a_call_of_few_rows_ends_no_threads() -> None:
    # libgomp ends the threads that a call does not use, and the next step would have to start them anew.
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-c", CODE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "3 []\n"
