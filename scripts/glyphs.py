"""Captioned glyphs that train the embedded diffusion model: open fonts and drawn strokes.

None of them is handwritten. A glyph is rendered at 64x64, bent, slanted and thickened, cropped to
its ink, and reduced to an 8x8 mask of ink counts, the format of UCI's handwritten digits;
`semanticfl_ref.data.scenes` then treats both alike. Needs fonts and fontconfig's `fc-list`.

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
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NAMES = DIGIT_NAMES + [f"letter {c.lower()}" for c in CAPITALS]
S = 64
# Words in the names of fonts that do not draw digits and capitals as such.
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
# square (x right, y down) that a Catmull-Rom spline passes through. The variants of a digit are
# with and without serif, bar, loop or closing stroke.
STROKES: dict[str, list[list[list[tuple[float, float]]]]] = {
    "0": [
        [[(0.5, 0.05), (0.2, 0.3), (0.2, 0.7), (0.5, 0.95), (0.8, 0.7), (0.8, 0.3), (0.5, 0.05)]],
        [[(0.55, 0.08), (0.3, 0.3), (0.25, 0.7), (0.45, 0.95), (0.72, 0.7), (0.75, 0.3),
          (0.5, 0.06)]],
    ],
    "1": [
        [[(0.5, 0.05), (0.5, 0.5), (0.5, 0.95)]],
        [[(0.3, 0.25), (0.42, 0.17), (0.53, 0.05)], [(0.53, 0.05), (0.53, 0.5), (0.52, 0.95)]],
        [[(0.3, 0.28), (0.5, 0.05)], [(0.5, 0.05), (0.5, 0.95)], [(0.25, 0.95), (0.75, 0.95)]],
        [[(0.62, 0.05), (0.5, 0.5), (0.38, 0.95)]],
    ],
    "2": [
        [[(0.22, 0.25), (0.4, 0.07), (0.7, 0.12), (0.75, 0.35), (0.5, 0.65), (0.22, 0.93)],
         [(0.22, 0.93), (0.5, 0.92), (0.8, 0.93)]],
        [[(0.25, 0.2), (0.5, 0.05), (0.72, 0.22), (0.62, 0.5), (0.35, 0.8), (0.22, 0.88),
          (0.3, 0.72), (0.5, 0.85), (0.8, 0.92)]],
    ],
    "3": [
        [[(0.25, 0.13), (0.5, 0.05), (0.73, 0.2), (0.65, 0.4), (0.45, 0.47)],
         [(0.45, 0.47), (0.7, 0.55), (0.76, 0.75), (0.55, 0.95), (0.22, 0.87)]],
        [[(0.22, 0.07), (0.5, 0.07), (0.75, 0.07)], [(0.75, 0.07), (0.48, 0.42)],
         [(0.48, 0.42), (0.73, 0.55), (0.72, 0.83), (0.45, 0.95), (0.22, 0.85)]],
    ],
    "4": [
        [[(0.55, 0.05), (0.35, 0.4), (0.18, 0.65)], [(0.18, 0.65), (0.5, 0.65), (0.85, 0.63)],
         [(0.62, 0.4), (0.6, 0.7), (0.6, 0.95)]],
        [[(0.28, 0.08), (0.22, 0.3), (0.25, 0.5)], [(0.25, 0.5), (0.5, 0.52), (0.75, 0.48)],
         [(0.72, 0.08), (0.7, 0.5), (0.68, 0.95)]],
        [[(0.6, 0.05), (0.2, 0.65)], [(0.2, 0.65), (0.82, 0.65)], [(0.6, 0.05), (0.6, 0.95)]],
    ],
    "5": [
        [[(0.75, 0.07), (0.5, 0.07), (0.3, 0.08)], [(0.3, 0.08), (0.27, 0.25), (0.25, 0.45)],
         [(0.25, 0.45), (0.5, 0.38), (0.75, 0.55), (0.7, 0.83), (0.45, 0.95), (0.22, 0.87)]],
        [[(0.8, 0.05), (0.4, 0.07)],
         [(0.4, 0.07), (0.3, 0.42), (0.55, 0.42), (0.7, 0.65), (0.55, 0.9), (0.25, 0.93)]],
    ],
    "6": [
        [[(0.65, 0.06), (0.4, 0.25), (0.25, 0.6), (0.35, 0.9), (0.6, 0.94), (0.74, 0.75),
          (0.6, 0.55), (0.4, 0.58), (0.28, 0.75)]],
        [[(0.45, 0.05), (0.28, 0.4), (0.28, 0.75), (0.5, 0.95), (0.7, 0.8), (0.6, 0.6),
          (0.42, 0.62), (0.3, 0.8)]],
    ],
    "7": [
        [[(0.2, 0.08), (0.5, 0.08), (0.8, 0.08)], [(0.8, 0.08), (0.6, 0.45), (0.42, 0.95)]],
        [[(0.2, 0.1), (0.5, 0.07), (0.78, 0.08)], [(0.78, 0.08), (0.6, 0.4), (0.45, 0.95)],
         [(0.35, 0.5), (0.75, 0.48)]],
        [[(0.22, 0.22), (0.22, 0.08)], [(0.22, 0.08), (0.78, 0.08)],
         [(0.78, 0.08), (0.55, 0.5), (0.5, 0.95)]],
    ],
    "8": [
        [[(0.7, 0.18), (0.5, 0.05), (0.3, 0.2), (0.48, 0.45), (0.72, 0.7), (0.5, 0.95),
          (0.27, 0.75), (0.5, 0.47), (0.72, 0.22), (0.62, 0.08)]],
        [[(0.5, 0.48), (0.3, 0.3), (0.5, 0.05), (0.7, 0.28), (0.5, 0.48)],
         [(0.5, 0.48), (0.24, 0.72), (0.5, 0.95), (0.76, 0.72), (0.5, 0.48)]],
    ],
    "9": [
        [[(0.72, 0.25), (0.5, 0.05), (0.28, 0.25), (0.42, 0.48), (0.7, 0.35)],
         [(0.73, 0.15), (0.7, 0.55), (0.6, 0.95)]],
        [[(0.7, 0.2), (0.45, 0.07), (0.28, 0.3), (0.5, 0.48), (0.7, 0.25), (0.72, 0.6), (0.55, 0.9),
          (0.3, 0.93)]],
    ],
}  # fmt: skip


def captioned_glyphs(
    count: int, seed: int, fonts: list[str], stroke_share: float = 0.5, digit_share: float = 0.75
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw glyphs.

    Args:
        count: N.
        seed: for all random generators.
        fonts: font files, see `usable_fonts`.
        stroke_share: share of the digits that are drawn by strokes instead of set in a font.
        digit_share: share of digits among the glyphs; the rest are capitals.

    Returns:
        Masks uint8 [N, 8, 8] in 0 ... 16, and classes int64 [N], indices into NAMES.
    """
    source = random.Random(seed)
    images, classes = [], []
    for _ in range(count):
        is_digit = source.random() < digit_share
        label = source.randrange(10) if is_digit else 10 + source.randrange(26)
        if is_digit and source.random() < stroke_share:
            images.append(_draw_strokes(source, CHARACTERS[label]))
        else:
            images.append(_draw_font(source, CHARACTERS[label], fonts))
        classes.append(label)
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for start in range(0, count, 500):
        chunk = torch.from_numpy(np.stack(images[start : start + 500]))
        masks.append(_mask(chunk, generator))
    return torch.cat(masks), torch.tensor(classes)


def usable_fonts() -> list[str]:
    """Files of the installed scalable fonts that have digits and capitals, sorted by name."""
    listing = subprocess.run(
        ["fc-list", "--format", "%{file}\n"], capture_output=True, text=True, check=True
    )
    files = sorted(set(listing.stdout.splitlines()))
    return [file for file in files if _is_usable(file)]


def _is_usable(file: str) -> bool:
    left_out = any(word in file.lower() for word in LEFT_OUT)
    if left_out or Path(file).suffix.lower() not in {".ttf", ".otf"}:
        return False
    try:
        font = ImageFont.truetype(file, 20)
        has_ink = all(font.getmask(c).getbbox() for c in CHARACTERS)
        # A missing glyph is the same box for all.
        return has_ink and len({bytes(font.getmask(c)) for c in DIGITS}) == 10
    except OSError:
        return False


def _draw_font(source: random.Random, character: str, fonts: list[str]) -> np.ndarray:
    """A character in a random font and weight, uint8 [S, S]."""
    image = Image.new("L", (S, S), 0)
    font = ImageFont.truetype(source.choice(fonts), 44)
    ImageDraw.Draw(image).text(
        (S / 2, S / 2),
        character,
        fill=255,
        font=font,
        anchor="mm",
        stroke_width=source.choice([0, 0, 1, 1, 2, 3]),
    )
    return np.asarray(image)


def _draw_strokes(source: random.Random, character: str) -> np.ndarray:
    """A digit by strokes with random width and wobble, uint8 [S, S]."""
    image = Image.new("L", (S, S), 0)
    canvas = ImageDraw.Draw(image)
    width, wobble = source.randint(4, 10), source.uniform(0.01, 0.045)
    # A point that two strokes share moves once, so that they still meet.
    moved: dict[tuple[float, float], tuple[float, float]] = {}
    for stroke in source.choice(STROKES[character]):
        for x, y in stroke:
            wobbled = (x + source.gauss(0, wobble), y + source.gauss(0, wobble))
            moved.setdefault((x, y), wobbled)
        line = [(10 + 44 * x, 8 + 48 * y) for x, y in _spline([moved[point] for point in stroke])]
        canvas.line(line, fill=255, width=width, joint="curve")
        for x, y in (line[0], line[-1]):
            canvas.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return np.asarray(image)


def _spline(points: list[tuple[float, float]], per_span: int = 8) -> list[tuple[float, float]]:
    """A Catmull-Rom spline through the points; the end points are doubled."""
    p = np.array([points[0], *points, points[-1]])
    t = np.linspace(0, 1, per_span, endpoint=False)[:, None]
    spans = []
    for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        square = (2 * a - 5 * b + 4 * c - d) * t**2
        cube = (3 * b - a - 3 * c + d) * t**3
        spans.append(0.5 * (2 * b + (c - a) * t + square + cube))
    return [tuple(q) for q in np.concatenate([*spans, p[-1:]])]


def _mask(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Bend and slant images uint8 [N, S, S], crop them to the ink, and binarise them.

    Returns:
        The inked pixels of each 4x4 block, uint8 [N, 8, 8].
    """
    n = len(images)
    ink = images.float()[:, None] / 255

    def normal(deviation: float, *shape: int) -> torch.Tensor:
        return deviation * torch.randn(*shape, generator=generator)

    slant, turn = normal(0.18, n), normal(0.12, n)
    one, zero = torch.ones(n), torch.zeros(n)
    affine = 1.25 * _matrices([one, slant - turn, zero], [turn, one, zero])
    bend = normal(0.07, n, 2, 4, 4)
    bend = F.interpolate(bend, size=(S, S), mode="bicubic", align_corners=True)
    grid = F.affine_grid(affine, [n, 1, S, S], align_corners=False) + bend.permute(0, 2, 3, 1)
    bent = F.grid_sample(ink, grid, align_corners=False) > 0.5

    left, right = _extent(bent.any(2)[:, 0])
    top, bottom = _extent(bent.any(3)[:, 0])
    centre_x, centre_y = (left + right) / S - 1, (top + bottom) / S - 1
    # The box is filled in height; its width follows, up to the box.
    stretch = torch.exp(normal(0.12, n))
    scale_y = (bottom - top) / S
    scale_x = torch.maximum(scale_y * stretch, (right - left) / S)
    crop = _matrices([scale_x, zero, centre_x], [zero, scale_y, centre_y])
    grid = F.affine_grid(crop, [n, 1, 32, 32], align_corners=False)
    box = F.grid_sample(bent.float(), grid, align_corners=False) > 0.5
    return F.avg_pool2d(box.float(), 4).mul(16).round().to(torch.uint8)[:, 0]


def _matrices(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    """Affine maps [N, 2, 3] from their rows' entries, each [N]."""
    return torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 1)


def _extent(is_inked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the ink begins and ends: [N, S] -> two of float32 [N]."""
    is_inked = is_inked.float()
    return is_inked.argmax(1).float(), S - is_inked.flip(1).argmax(1).float()
