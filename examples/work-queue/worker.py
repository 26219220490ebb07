#!/usr/bin/env python3
"""Reads its task from standard input, says so, and works on it for a while. It knows nothing of queues."""

import os
import sys
import time

task = sys.stdin.read().strip()

# No task at all is nothing that another try would mend. EX_DATAERR of sysexits.h, so that it can be told apart.
if not task:
    sys.exit(65)

# Tools that print may keep it back until the buffer is full; a log is better read as it happens.
print("Processing " + task, flush=True)
time.sleep(float(os.environ.get("WORK_SECONDS", "1")))

# Only for trying out what becomes of a task that fails: FAIL_FIRST=cherry fails at the first delivery of that task.
if task == os.environ.get("FAIL_FIRST") and os.environ.get("MESSAGE_REDELIVERED") != "true":
    sys.exit("worker.py: no luck with " + task)
