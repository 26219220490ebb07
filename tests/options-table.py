#!/usr/bin/env python3
"""The options of the installed amqp-consume and amqp-publish beside ours, as Markdown tables.

    tests/options-table.py --check QCONSUME QPUBLISH    is the table in the documentation up to date?
    tests/options-table.py --write QCONSUME QPUBLISH    bring it up to date

Reads the help of all four. An option that we lack, or that has another letter than theirs, is an error; so is a
reason for an option that isn't there.
"""

import re
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "moving-from-amqp-tools.md"

CONNECTION = {
    "--url": "`amqp://host/` is the virtual host `/`, and an unknown query parameter is an error; several URLs are the "
    "nodes of a cluster. Without any address it is a usage error, not localhost.",
    "--server": "Flag over variable: it takes the place of `BROKER_URL`, and contradicts `--url`. IPv6 addresses work.",
    "--port": "Only beside `--server`: without an address nothing is guessed.",
    "--vhost": "Only beside `--server`, likewise. The empty name is `/`.",
    "--username": "Only beside `--server`, likewise.",
    "--password": "Only beside `--server`, likewise. Better in `QCONSUME_PASSWORD`: the command line is visible to every "
    "user of the machine. Never printed.",
    "--authfile": "Only beside `--server`, likewise. Lines of any length; the last needs no newline.",
    "--heartbeat": "10 seconds unless told otherwise, and they go on while the command runs: without them a broker "
    "that is gone is never noticed. 0 asks for none: then what the broker proposes holds.",
    "--cacert": "The system's CAs where it isn't given, or those of `SSL_CERT_FILE`: there is no file with a fixed name. "
    "Without TLS it is an error, not plain text.",
    "--cert": "Where no password is given it is also what to log in with (EXTERNAL). Without TLS it is an error.",
    "--key": "May be left out where the key is in the file of `--cert`. Without TLS it is an error.",
    "--usage": "The same as `--help`.",
    "--help": "Also `-h`.",
}

DIFFERENT = {
    "amqp-consume": {
        **CONNECTION,
        "--queue": "Or `QUEUE`. Without any, and without `-e`, `-d` or `-x`, it is a usage error: an empty variable in a "
        "manifest must not become a queue that nobody fills.",
        "--exchange": "Without `-r` it is an error, not a crash. Without `-q` the new queue is exclusive, as the manual "
        "page says. With `-q` the queue is declared as with `-d`.",
        "--routing-key": "The empty key binds with the empty key, instead of not binding at all.",
        "--declare": "A queue that is there is taken as it is; one that isn't is declared durable, not to be deleted with "
        "its last consumer: RabbitMQ 4.3 refuses transient ones that are shared.",
        "--exclusive": "When the connection is lost, so is the queue: 69, instead of a new, empty queue.",
        "--no-ack": "Takes one message (or as many as `-c` says), not the whole queue: acknowledged, and that confirmed, "
        "before the command starts. The command's status is the exit status.",
        "--count": "1 unless told otherwise, instead of for ever; 0 is for ever, instead of none. A failure ends it, with "
        "that status.",
        "--prefetch-count": "Accepted, and changes nothing: a worker holds one message, so that no other one waits behind "
        "a command, or is counted as tried when nobody ran it.",
    },
    "amqp-publish": {
        **CONNECTION,
        "--exchange": "An exchange that isn't there, and a message that it routes to no queue, are errors: publishing is "
        "mandatory and confirmed.",
        "--routing-key": "Without an exchange a queue of that name has to be there, or it is an error, not a message that "
        "is dropped while all looks well.",
        "--persistent": "Accepted, and changes nothing: messages are always persistent.",
        "--line-buffered": "The newline is no part of the message.",
    },
}


def options(program):
    """The options in a program's help: their long names, with their letters."""
    ran = subprocess.run([program, "-?"], capture_output=True, text=True, check=False)
    found = {}
    # An option's description may go on in the next lines.
    for line in re.split(r"\n(?=\s+-|\S)", ran.stdout):
        line = re.sub(r"\s+", " ", line)
        match = re.match(r" (?:-(\S), )?(--[a-z][a-z-]*)", line)
        if match:
            letter = match[1]
            found[match[2]] = letter
        # Other names of the same option, on its line or on one below.
        aliases = re.search(r"\[alias(?:es)?: ([^]]*)\]", line)
        if aliases:
            found.update(dict.fromkeys(aliases[1].split(", "), letter))
    if not found:
        sys.exit(f"{program} -? shows no options")
    return found


def takes_hidden(program, letter, name):
    """Whether a program takes an option that its help doesn't show: one that changes nothing."""
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
