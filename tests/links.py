#!/usr/bin/env python3
"""Checks the pages of a release (the archives, the Debian packages, the crate): tests/links.py FOLDER…

Fails if a page links to a file, or shows a picture, that isn't in its folder."""

import re
import sys
from pathlib import Path

dead = []
links = 0
for folder in map(Path, sys.argv[1:]):
    for page in folder.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]*)", page.read_text()):
            if target and "://" not in target:
                links += 1
                file = page.parent / target.replace("\n", " ")
                if not file.exists() or not file.resolve().is_relative_to(folder.resolve()):
                    dead.append(f"{page}: {target} is missing")
print(*dead, f"{links} links, {len(dead)} of them dead", sep="\n")
sys.exit(bool(dead) or not links)
