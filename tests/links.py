#!/usr/bin/env python3
"""Fails when a page in a folder links to a file that isn't there, or shows a picture that isn't: tests/links.py FOLDER…

For what people get of the pages: the archive, the Debian package, the crate."""

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
                    dead.append(f"{page}: {target} isn't there")
print(*dead, f"{links} links, {len(dead)} of them dead", sep="\n")
sys.exit(bool(dead) or not links)
