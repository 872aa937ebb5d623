"""Emoji of several vendors as folders of images: a client per vendor, a class per group of Unicode.

    npm pack emoji-datasource-google emoji-datasource-twitter
    python scripts/emoji_folders.py emoji emoji-datasource-*.tgz
    python -m semanticfl_ref train --dataset image_folder --data-dir emoji --scenario natural \
        --set data.clients_from=folder --clients 2 --clients-per-round 2

Writes emoji/train/VENDOR/GROUP/NAME.png and emoji/test/GROUP/VENDOR-NAME.png, 64 x 64 pixels: as
many emoji of each of eight groups, a fifth of them for the test, the same ones of every vendor.
Google's images are under the Apache License 2.0, Twitter's under CC BY 4.0.
"""

import json
import random
import sys
import tarfile
from pathlib import Path

# Components are no emoji of their own, and a flag's frame alone gives its group away.
LEFT_OUT = {"Component", "Flags"}


def groups(listed: list[dict], vendors: list[str]) -> dict[str, list[str]]:
    """The image files of each group that all vendors have, shuffled, as many of each group."""
    found: dict[str, list[str]] = {}
    for emoji in listed:
        if emoji["category"] not in LEFT_OUT and all(emoji[f"has_img_{v}"] for v in vendors):
            found.setdefault(emoji["category"], []).append(emoji["image"])
    count = min(map(len, found.values()))
    shuffle = random.Random(0)
    return {group: shuffle.sample(files, count) for group, files in sorted(found.items())}


def main(out: Path, packages: list[Path]) -> None:
    vendors = [package.name.split("-")[2] for package in packages]
    for vendor, package in zip(vendors, packages, strict=True):
        with tarfile.open(package) as archive:
            # Read in the archive's order: it is one compressed stream.
            images = {
                Path(member.name).name: archive.extractfile(member).read()
                for member in archive
                if member.name.startswith(f"package/img/{vendor}/64/")
                or member.name == "package/emoji.json"
            }
        for group, files in groups(json.loads(images["emoji.json"]), vendors).items():
            name = group.replace(" & ", "-and-").replace(" ", "-")
            for index, file in enumerate(files):
                if index < len(files) // 5:
                    path = out / "test" / name / f"{vendor}-{file}"
                else:
                    path = out / "train" / vendor / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(images[file])


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
