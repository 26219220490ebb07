#!/usr/bin/env python3
"""Compares the options of the installed amqp-consume and amqp-publish with ours, in Markdown tables.

    tests/options-table.py --check QCONSUME QPUBLISH    checks that the documentation's tables are up to date
    tests/options-table.py --write QCONSUME QPUBLISH    updates them

Reads the help of all four programs. Fails if we lack one of their options, or have another letter for it, or if
DIFFERENT names an option that they don't have.
"""

import re
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "moving-from-amqp-tools.md"

CONNECTION = {
    "--url": "`amqp://host/` is the virtual host `/`, and an unknown query parameter is an error. Several URLs are "
    "the nodes of a cluster. Without any address it is a usage error, not localhost.",
    "--server": "As a flag it replaces the variable `BROKER_URL`; together with `--url` it is an error. IPv6 "
    "addresses work.",
    "--port": "Only with `--server`: qconsume never assumes localhost.",
    "--vhost": "Only with `--server`. The empty name is `/`.",
    "--username": "Only with `--server`.",
    "--password": "Only with `--server`. Never printed. Better set `QCONSUME_PASSWORD`, because the command line is "
    "visible to every user of the machine.",
    "--authfile": "Only with `--server`. Lines may have any length, and the last one needs no newline.",
    "--heartbeat": "The default is 10 seconds, and qconsume sends heartbeats while the command runs: without them it "
    "can't notice a broker that is gone. With 0 the broker's proposal is used.",
    "--cacert": "The default is the system's CAs, or those of `SSL_CERT_FILE`, not a file with a fixed name. Without "
    "TLS it is an error, not plain text.",
    "--cert": "Without a password it is also the login (EXTERNAL). Without TLS it is an error.",
    "--key": "The default is the file of `--cert`. Without TLS it is an error.",
    "--usage": "The same as `--help`.",
    "--help": "Also `-h`.",
}

DIFFERENT = {
    "amqp-consume": {
        **CONNECTION,
        "--queue": "Or `QUEUE`. Without a queue, and without `-e`, `-d` or `-x`, it is a usage error: an empty "
        "variable in a manifest must not create a queue that no publisher fills.",
        "--exchange": "Without `-r` it is an error, not a crash. Without `-q` the new queue is exclusive, as the "
        "manual page says; the log has its name, after `qconsume: server provided queue name: ` instead of "
        "`Server provided queue name: `. With `-q` the queue is declared as with `-d`: it stays when qconsume ends, "
        "and its binding goes on to fill it.",
        "--routing-key": "An empty key binds with the empty key, instead of creating no binding.",
        "--declare": "A queue that exists is used as it is. A new one is durable, and not deleted with its last "
        "consumer: RabbitMQ 4.3 refuses shared transient queues. Without `-q` it is exclusive.",
        "--exclusive": "If the connection is lost, so is the queue with its messages: qconsume exits 69, or 75 if the "
        "command is running.",
        "--no-ack": "Takes one message (or as many as `-c` says), not the whole queue. Before the command starts, the "
        "message is acknowledged, and the acknowledgement is confirmed. The exit status is the command's.",
        "--count": "The default is 1, instead of no limit. 0 means no limit, instead of no message. A failure ends "
        "the run, with its status.",
        "--prefetch-count": "Accepted, without effect: qconsume holds only one message, so that no other one waits "
        "for its command to end, or counts as delivered although no command processed it.",
    },
    "amqp-publish": {
        **CONNECTION,
        "--exchange": "It is an error (78) if the exchange doesn't exist, or routes a message to no queue: publishing "
        "is mandatory and confirmed. `--no-mandatory` allows a message that no queue takes.",
        "--routing-key": "Without an exchange it is an error if no queue has this name; amqp-publish's message is "
        "silently dropped.",
        "--persistent": "Accepted, without effect: messages are always persistent.",
        "--line-buffered": "The newline is not part of the message.",
        "--header": "Without a colon it is an error, not a warning. A name can be given only once.",
        "--heartbeat": "The default is 10 seconds. With 0 the broker's proposal is used.",
    },
}


def options(program):
    """The options in a program's help: a dict of long names and letters (or None)."""
    ran = subprocess.run([program, "-?"], capture_output=True, text=True, check=False)
    found = {}
    # An option's description may continue in the next lines.
    for line in re.split(r"\n(?=\s+-|\S)", ran.stdout):
        line = re.sub(r"\s+", " ", line)
        match = re.match(r" (?:-(\S), )?(--[a-z][a-z-]*)", line)
        if match:
            letter = match[1]
            found[match[2]] = letter
        # Aliases, on the option's line or below it.
        aliases = re.search(r"\[alias(?:es)?: ([^]]*)\]", line)
        if aliases:
            found.update(dict.fromkeys(aliases[1].split(", "), letter))
    if not found:
        sys.exit(f"{program} -? shows no options")
    return found


def takes_hidden(program, letter, name):
    """Whether a program accepts an option that its help doesn't show."""
    names = [name] + ([f"-{letter}"] if letter else [])

    def runs(*words):
        return subprocess.run([program, *words, "--version"], capture_output=True, check=False).returncode == 0

    return all(runs(name) or runs(name, "1") for name in names)


def show(letter, name):
    return f"`-{letter}`, `{name}`" if letter else f"`{name}`"


def table(theirs, ours):
    reasons = {option: why for option, why in DIFFERENT[theirs].items() if why}
    have = options(ours)
    lines = [f"| {theirs} | {Path(ours).name} | |", "|---|---|---|"]
    problems = []
    for name, letter in options(theirs).items():
        hidden = name not in have or name == "--help"
        if have.get(name, "missing") != letter and not (hidden and takes_hidden(ours, letter, name)):
            problems.append(f"{theirs} has {show(letter, name)}, {ours} hasn't")
        elif name in reasons:
            lines.append(f"| {show(letter, name)} | different | {reasons.pop(name)} |")
        else:
            lines.append(f"| {show(letter, name)} | same | |")
    problems += [f"{theirs} has no {name}" for name in reasons]
    return lines, problems


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in ("--check", "--write"):
        sys.exit(__doc__)
    before = text = DOCUMENT.read_text()
    problems = []
    for theirs, ours in zip(DIFFERENT, sys.argv[2:]):
        lines, more = table(theirs, ours)
        problems += more
        begin, end = f"<!-- options of {theirs} -->\n", f"<!-- end of {theirs} -->"
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        text = head + begin + "\n".join(lines) + "\n" + end + tail
    if problems:
        sys.exit("\n".join(problems))
    if sys.argv[1] == "--write":
        DOCUMENT.write_text(text)
    elif text != before:
        sys.exit(f"{DOCUMENT} is out of date: run tests/options-table.py --write QCONSUME QPUBLISH")


main()
