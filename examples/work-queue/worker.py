#!/usr/bin/env python3
"""Reads its task from standard input, prints it, and works on it for a while. It knows nothing about queues."""

import os
import sys
import time

task = sys.stdin.read().strip()

# If there is no task, no retry helps. 65 is EX_DATAERR of sysexits.h. With QCONSUME_REJECT_ON=65, as in job.yaml, the message is
# dead-lettered.
if not task:
    sys.exit(65)

# flush, because Python otherwise keeps the line until a buffer is full, and the log should show it at once.
print("Processing " + task, flush=True)
time.sleep(float(os.environ.get("WORK_SECONDS", "1")))

# To try out a failing task: with FAIL_FIRST=cherry, that task fails at its first delivery.
if task == os.environ.get("FAIL_FIRST") and os.environ.get("MESSAGE_REDELIVERED") != "true":
    sys.exit("worker.py: no luck with " + task)
