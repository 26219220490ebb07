#!/usr/bin/env python3
"""Draws `docs/demo.svg`, the terminal in README.md, from a real run of `make demo`; or checks that it is up to date.

    tests/recording.py             runs the demo and writes docs/demo.svg (make recording)
    tests/recording.py --check     runs the demo and compares it with docs/demo.svg (make check-recording)

Runs differ in their times, in the order of the lines, in which worker took which message, and perhaps in the queue's
name: `comparable` removes these differences. If anything else differs, the picture is out of date.
"""

import argparse
import difflib
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent

# About the width of a README on GitHub, with a readable font size.
COLUMNS = 100
FONT_SIZE = 14
CHARACTER_WIDTH = 8.43
LINE_HEIGHT = 20
MARGIN = 18
TITLE_BAR = 34

# The coloured parts; the first match wins. The groups' names are classes in STYLE.
COLOURS = re.compile(
    r"(?P<comment>^# .*)|(?P<prompt>^\$ )|(?P<good>exit status 0)|(?P<bad>exit status [1-9]\d*|error:)|(?P<dim> \| )"
)

STYLE = f"""
  text {{ font: {FONT_SIZE}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; fill: #e6edf3; white-space: pre }}
  .comment {{ fill: #9da7b1 }} .prompt {{ fill: #7ee787 }} .good {{ fill: #7ee787 }} .bad {{ fill: #ff7b72; font-weight: bold }} .dim {{ fill: #6e7681 }}
  .line {{ animation: appear 0.2s both }}
  @keyframes appear {{ from {{ opacity: 0 }} }}
  @media (prefers-reduced-motion: reduce) {{ .line {{ animation: none }} }}
"""

SVG = "{http://www.w3.org/2000/svg}"


def record(command):
    """The demo's lines, each with the seconds since the first one. Skips the lines of make and cargo before them."""
    lines, first = [], None
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if first is None and line.startswith("$ "):
                first = time.monotonic()
            if first is not None:
                lines.append((time.monotonic() - first, line.rstrip("\n")))
    if process.returncode != 0:
        sys.exit(f"recording: {shlex.join(command)} failed with status {process.returncode}, so there is nothing to draw")
    if not lines:
        sys.exit(f"recording: {shlex.join(command)} printed no line that begins with '$ '")
    return lines


def rows(line):
    """Wraps a line at spaces to the terminal's width; aligns further rows with its last column."""
    indent = " " * (line.rfind(" | ") + 3 if " | " in line else 0)
    row, result = "", []
    for word in re.findall(r"\S+\s*|\s+", line):
        if len((row + word).rstrip()) > COLUMNS and row.strip():
            result.append(row.rstrip())
            row = indent
        row += word
    return [*result, row.rstrip()]


def coloured(row):
    text, end = "", 0
    for match in COLOURS.finditer(row):
        text += escape(row[end : match.start()])
        text += f'<tspan class="{match.lastgroup}">{escape(match.group())}</tspan>'
        end = match.end()
    return text + escape(row[end:])


def draw(lines):
    """The picture, as SVG. Lines appear with the run's timing; a viewer without animations shows all of them."""
    texts, top = [], TITLE_BAR + MARGIN
    for seconds, line in lines:
        texts.append(f'<g class="line" style="animation-delay: {seconds:.1f}s">')
        for row in rows(line):
            texts.append(f'<text x="{MARGIN}" y="{top}" xml:space="preserve">{coloured(row)}</text>')
            top += LINE_HEIGHT
        texts.append("</g>")
    width, height = round(COLUMNS * CHARACTER_WIDTH) + 2 * MARGIN, top + MARGIN - LINE_HEIGHT // 2
    dots = "".join(
        f'<circle cx="{20 + 20 * index}" cy="{TITLE_BAR // 2 + 2}" r="6" fill="{colour}"/>'
        for index, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    # The frame makes the terminal visible on dark pages.
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>make demo: eight messages, consumed by two workers</title>
<!-- Drawn by tests/recording.py from a run of make demo: don't edit. -->
<style>{STYLE}</style>
<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#0d1117" stroke="#6e7681"/>
{dots}
{chr(10).join(texts)}
</svg>
"""


def drawn(svg):
    """The inverse of `draw`: a picture's lines, each with its seconds."""
    lines = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        texts = ["".join(text.itertext()) for text in group.iter(f"{SVG}text")]
        line = " ".join([texts[0], *(text.strip() for text in texts[1:])]) if texts else ""
        seconds = re.search(r"([\d.]+)s", group.get("style", ""))
        lines.append((float(seconds.group(1)) if seconds else 0.0, line))
    return lines


def comparable(lines):
    """The lines without what differs between runs, in an order that doesn't depend on the workers' speed."""
    paragraphs = [[]]
    for _, line in lines:
        line = re.sub(r"^worker \d ", "worker N ", line)
        line = re.sub(r"\bseconds=[\d.]+", "seconds=S", line)
        line = re.sub(r"\bqconsume-demo-\d+", "job1", line)
        if not line:
            paragraphs.append([])
        elif line.startswith(" ") and paragraphs[-1]:
            paragraphs[-1][-1] += "\n" + line
        else:
            paragraphs[-1].append(line)
    # Only the order of the workers' runs varies.
    text = "\n\n".join("\n".join(sorted(part, key=lambda line: line if line.startswith("worker N ") else "")) for part in paragraphs)
    return text.splitlines()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the picture instead of writing it")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/demo.svg", help="the picture")
    parser.add_argument("--run", default="make --no-print-directory demo", help="the command whose output is drawn")
    options = parser.parse_args()

    lines = record(shlex.split(options.run))
    if not options.check:
        options.picture.write_text(draw(lines))
        return
    committed = options.picture.read_text()
    shown = drawn(committed)
    difference = list(difflib.unified_diff(comparable(shown), comparable(lines), "in the picture", "in this run", lineterm="", n=1))
    if difference:
        print("\n".join(difference), file=sys.stderr)
        sys.exit(f"recording: {options.picture.name} doesn't show what `make demo` prints now: make recording")
    if draw(shown) != committed:
        sys.exit(f"recording: {options.picture.name} was edited, or tests/recording.py draws differently now: make recording")
    print(f"recording: {options.picture.name} shows what `make demo` prints")


if __name__ == "__main__":
    main()
