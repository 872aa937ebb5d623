"""Captioned glyphs for the embedded diffusion model's training: open fonts and drawn strokes, never
a handwritten image.

A glyph is rendered at 64x64, bent, slanted and thickened, cropped to its ink, and reduced to an 8x8
mask of ink counts, the form in which UCI's handwritten digits come; `data.scenes` then does the
same to both. Run once by `make_tiny`; needs fonts.

Letters: N glyphs, S = 64 pixels.
"""

import random
import subprocess
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

DIGITS = "0123456789"
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHARACTERS = DIGITS + CAPITALS
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"] + [
    f"letter {c.lower()}" for c in CAPITALS
]
S = 64
LEFT_OUT = (
    "math",
    "symbol",
    "keyboard",
    "icon",
    "emoji",
    "dingbat",
    "ornament",
    "barcode",
    "opsmall",
    "initials",
)

# A digit as strokes: each variant is a list of strokes, each stroke a list of points in the unit
# square (x right, y down)
# that a Catmull-Rom spline passes through. Several variants per digit: with and without serif, bar,
# loop or closing stroke.
STROKES: dict[str, list[list[list[tuple[float, float]]]]] = {
    "0": [[[(0.5, 0.05), (0.2, 0.3), (0.2, 0.7), (0.5, 0.95), (0.8, 0.7), (0.8, 0.3), (0.5, 0.05)]],
          [[(0.55, 0.08), (0.3, 0.3), (0.25, 0.7), (0.45, 0.95), (0.72, 0.7), (0.75, 0.3), (0.5, 0.06)]]],
    "1": [[[(0.5, 0.05), (0.5, 0.5), (0.5, 0.95)]],
          [[(0.3, 0.25), (0.42, 0.17), (0.53, 0.05)], [(0.53, 0.05), (0.53, 0.5), (0.52, 0.95)]],
          [[(0.3, 0.28), (0.5, 0.05)], [(0.5, 0.05), (0.5, 0.95)], [(0.25, 0.95), (0.75, 0.95)]],
          [[(0.62, 0.05), (0.5, 0.5), (0.38, 0.95)]]],
    "2": [[[(0.22, 0.25), (0.4, 0.07), (0.7, 0.12), (0.75, 0.35), (0.5, 0.65), (0.22, 0.93)], [(0.22, 0.93), (0.5, 0.92), (0.8, 0.93)]],
          [[(0.25, 0.2), (0.5, 0.05), (0.72, 0.22), (0.62, 0.5), (0.35, 0.8), (0.22, 0.88), (0.3, 0.72), (0.5, 0.85), (0.8, 0.92)]]],
    "3": [[[(0.25, 0.13), (0.5, 0.05), (0.73, 0.2), (0.65, 0.4), (0.45, 0.47)], [(0.45, 0.47), (0.7, 0.55), (0.76, 0.75), (0.55, 0.95), (0.22, 0.87)]],
          [[(0.22, 0.07), (0.5, 0.07), (0.75, 0.07)], [(0.75, 0.07), (0.48, 0.42)], [(0.48, 0.42), (0.73, 0.55), (0.72, 0.83), (0.45, 0.95), (0.22, 0.85)]]],
    "4": [[[(0.55, 0.05), (0.35, 0.4), (0.18, 0.65)], [(0.18, 0.65), (0.5, 0.65), (0.85, 0.63)], [(0.62, 0.4), (0.6, 0.7), (0.6, 0.95)]],
          [[(0.28, 0.08), (0.22, 0.3), (0.25, 0.5)], [(0.25, 0.5), (0.5, 0.52), (0.75, 0.48)], [(0.72, 0.08), (0.7, 0.5), (0.68, 0.95)]],
          [[(0.6, 0.05), (0.2, 0.65)], [(0.2, 0.65), (0.82, 0.65)], [(0.6, 0.05), (0.6, 0.95)]]],
    "5": [[[(0.75, 0.07), (0.5, 0.07), (0.3, 0.08)], [(0.3, 0.08), (0.27, 0.25), (0.25, 0.45)], [(0.25, 0.45), (0.5, 0.38), (0.75, 0.55), (0.7, 0.83), (0.45, 0.95), (0.22, 0.87)]],
          [[(0.8, 0.05), (0.4, 0.07)], [(0.4, 0.07), (0.3, 0.42), (0.55, 0.42), (0.7, 0.65), (0.55, 0.9), (0.25, 0.93)]]],
    "6": [[[(0.65, 0.06), (0.4, 0.25), (0.25, 0.6), (0.35, 0.9), (0.6, 0.94), (0.74, 0.75), (0.6, 0.55), (0.4, 0.58), (0.28, 0.75)]],
          [[(0.45, 0.05), (0.28, 0.4), (0.28, 0.75), (0.5, 0.95), (0.7, 0.8), (0.6, 0.6), (0.42, 0.62), (0.3, 0.8)]]],
    "7": [[[(0.2, 0.08), (0.5, 0.08), (0.8, 0.08)], [(0.8, 0.08), (0.6, 0.45), (0.42, 0.95)]],
          [[(0.2, 0.1), (0.5, 0.07), (0.78, 0.08)], [(0.78, 0.08), (0.6, 0.4), (0.45, 0.95)], [(0.35, 0.5), (0.75, 0.48)]],
          [[(0.22, 0.22), (0.22, 0.08)], [(0.22, 0.08), (0.78, 0.08)], [(0.78, 0.08), (0.55, 0.5), (0.5, 0.95)]]],
    "8": [[[(0.7, 0.18), (0.5, 0.05), (0.3, 0.2), (0.48, 0.45), (0.72, 0.7), (0.5, 0.95), (0.27, 0.75), (0.5, 0.47), (0.72, 0.22), (0.62, 0.08)]],
          [[(0.5, 0.48), (0.3, 0.3), (0.5, 0.05), (0.7, 0.28), (0.5, 0.48)], [(0.5, 0.48), (0.24, 0.72), (0.5, 0.95), (0.76, 0.72), (0.5, 0.48)]]],
    "9": [[[(0.72, 0.25), (0.5, 0.05), (0.28, 0.25), (0.42, 0.48), (0.7, 0.35)], [(0.73, 0.15), (0.7, 0.55), (0.6, 0.95)]],
          [[(0.7, 0.2), (0.45, 0.07), (0.28, 0.3), (0.5, 0.48), (0.7, 0.25), (0.72, 0.6), (0.55, 0.9), (0.3, 0.93)]]],
}  # fmt: skip


def captioned_glyphs(
    count: int, seed: int, fonts: list[str], stroke_share: float = 0.5, digit_share: float = 0.75
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw glyphs with their class numbers (an index into `NAMES`).

    Args:
        count: how many.
        seed: of everything random here.
        fonts: font files, see `usable_fonts`.
        stroke_share: the part of the digits that is drawn by strokes instead of set in a font.
        digit_share: the part that is digits; the rest is capitals.

    Returns:
        masks uint8 [N, 8, 8] in 0 ... 16 and classes int64 [N].
    """
    pick = random.Random(seed)
    images, classes = [], []
    for _ in range(count):
        is_digit = pick.random() < digit_share
        label = pick.randrange(10) if is_digit else 10 + pick.randrange(26)
        drawn = is_digit and pick.random() < stroke_share
        images.append(
            _draw_strokes(pick, CHARACTERS[label])
            if drawn
            else _draw_font(pick, CHARACTERS[label], fonts)
        )
        classes.append(label)
    generator = torch.Generator().manual_seed(seed)
    masks = [
        _mask(torch.from_numpy(np.stack(images[i : i + 500])), generator)
        for i in range(0, count, 500)
    ]
    return torch.cat(masks), torch.tensor(classes)


def usable_fonts() -> list[str]:
    """The installed scalable fonts that have digits and capitals, one face a family and style,
    sorted by file name.
    """
    listing = subprocess.run(
        ["fc-list", "--format", "%{file}\n"], capture_output=True, text=True, check=True
    ).stdout
    files = sorted(
        {line for line in listing.splitlines() if Path(line).suffix.lower() in {".ttf", ".otf"}}
    )
    return [
        f for f in files if not any(word in f.lower() for word in LEFT_OUT) and _has_characters(f)
    ]


def _has_characters(file: str) -> bool:
    try:
        font = ImageFont.truetype(file, 20)
        inked = [font.getmask(c).getbbox() for c in CHARACTERS]
        # a missing glyph is one box for all
        return all(inked) and len({bytes(font.getmask(c)) for c in DIGITS}) == 10
    except OSError:
        return False


def _draw_font(pick: random.Random, character: str, fonts: list[str]) -> np.ndarray:
    image = Image.new("L", (S, S), 0)
    font = ImageFont.truetype(pick.choice(fonts), 44)
    ImageDraw.Draw(image).text(
        (S / 2, S / 2),
        character,
        fill=255,
        font=font,
        anchor="mm",
        stroke_width=pick.choice([0, 0, 1, 1, 2, 3]),
    )
    return np.asarray(image)


def _draw_strokes(pick: random.Random, character: str) -> np.ndarray:
    image = Image.new("L", (S, S), 0)
    canvas, width, wobble = ImageDraw.Draw(image), pick.randint(4, 10), pick.uniform(0.01, 0.045)
    # a point that two strokes share moves once, so that they still meet
    moved: dict[tuple[float, float], tuple[float, float]] = {}
    for stroke in pick.choice(STROKES[character]):
        for point in stroke:
            moved.setdefault(
                point, (point[0] + pick.gauss(0, wobble), point[1] + pick.gauss(0, wobble))
            )
        line = [(10 + 44 * x, 8 + 48 * y) for x, y in _spline([moved[point] for point in stroke])]
        canvas.line(line, fill=255, width=width, joint="curve")
        for x, y in (line[0], line[-1]):
            canvas.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return np.asarray(image)


def _spline(points: list[tuple[float, float]], per_span: int = 8) -> list[tuple[float, float]]:
    """A Catmull-Rom spline through the points, its ends doubled."""
    p = np.array([points[0], *points, points[-1]])
    t = np.linspace(0, 1, per_span, endpoint=False)[:, None]
    spans = [
        0.5
        * (
            2 * b
            + (c - a) * t
            + (2 * a - 5 * b + 4 * c - d) * t**2
            + (3 * b - a - 3 * c + d) * t**3
        )
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return [tuple(q) for q in np.concatenate([*spans, p[-1:]])]


def _mask(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Bend and slant uint8 [N, S, S], crop to the ink, binarise, count the ink of 4x4 blocks: uint8
    [N, 8, 8].
    """
    n = len(images)
    ink = images.float()[:, None] / 255

    def normal(deviation: float, *shape: int) -> torch.Tensor:
        return deviation * torch.randn(*shape, generator=generator)

    slant, turn = normal(0.18, n), normal(0.12, n)
    one, zero = torch.ones(n), torch.zeros(n)
    affine = 1.25 * torch.stack(
        [torch.stack([one, slant - turn, zero], 1), torch.stack([turn, one, zero], 1)], 1
    )
    bend = F.interpolate(
        normal(0.07, n, 2, 4, 4), size=(S, S), mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    bent = (
        F.grid_sample(
            ink,
            F.affine_grid(affine, list(ink.shape), align_corners=False) + bend,
            align_corners=False,
        )
        > 0.5
    )

    rows, columns = bent.any(3)[:, 0].float(), bent.any(2)[:, 0].float()
    first = lambda seen: seen.argmax(1).float()  # noqa: E731
    last = lambda seen: S - seen.flip(1).argmax(1).float()  # noqa: E731
    height, width = last(rows) - first(rows), last(columns) - first(columns)
    centre_x, centre_y = (
        (first(columns) + last(columns)) / S - 1,
        (first(rows) + last(rows)) / S - 1,
    )
    # a box that is filled in height; its width follows, up to the box
    stretch = torch.exp(normal(0.12, n))
    scale_y = height / S
    scale_x = torch.maximum(scale_y * stretch, width / S)
    crop = torch.stack(
        [torch.stack([scale_x, zero, centre_x], 1), torch.stack([zero, scale_y, centre_y], 1)], 1
    )
    box = (
        F.grid_sample(
            bent.float(),
            F.affine_grid(crop, [n, 1, 32, 32], align_corners=False),
            align_corners=False,
        )
        > 0.5
    )
    return F.avg_pool2d(box.float(), 4).mul(16).round().to(torch.uint8)[:, 0]
