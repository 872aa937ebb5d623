"""The files and commands that a document's reader is told to write and run."""

from pathlib import Path


def blocks(page: Path) -> list[str | tuple[str, str]]:
    """(file, text) of every named code block and the text of every command, in the page's order."""
    found, lines = [], iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith("```python "):
            text = []
            for inside in lines:
                if inside == "```":
                    break
                text.append(inside)
            found.append((line.split()[1], "\n".join(text) + "\n"))
        elif line.startswith("    $ "):
            found.append(line[6:])
    return found
