"""What the repository promises of itself: imports along the arrows, its size, its set-up."""

import ast
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "semanticfl_ref"
# A module may import its own part and those left of it.
ARROWS = [
    ("config", "method_settings", "schema", "errors", "storage", "randomness"),
    ("kernels",),
    ("data",),
    ("diffusion",),
    ("federated",),
    ("report",),
    ("comparison",),
    ("prepare",),
    ("train", "features", "study"),
    ("commands",),
    ("cli",),
    ("__main__",),
]
LEVEL = {part: level for level, parts in enumerate(ARROWS) for part in parts}


def modules() -> list[Path]:
    own = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    return sorted(own + list((ROOT / "kernels").rglob("*.py")))


def part_of(path: Path) -> str:
    if ROOT / "kernels" in path.parents:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "semanticfl_ref"
                else {node.module}
            )
    return found


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor a comment, nor a docstring alone."""
    source = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        ):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_along_the_arrows(path):
    part = part_of(path)
    for name in imports(path):
        if name.startswith("semanticfl_ref."):
            other = name.split(".")[1]
            if other.startswith("__"):  # the version
                continue
            assert LEVEL[other] <= LEVEL[part], (
                f"{path.name} imports {name}: {other} comes after {part}"
            )
            assert part != "kernels" or other == "kernels", "kernels import torch and triton alone"
        elif part == "kernels":
            assert name.split(".")[0] in {"torch", "triton"} | set(sys.stdlib_module_names), (
                f"{path.name} imports {name}"
            )
        if part == "report":
            assert name.split(".")[0] != "torch", (
                f"{path.name}: the report reads files, it needs no torch"
            )


# lines of code that `train` and `features` need: settings, data, diffusion, federation, kernels,
# commands
CORE = 5000
TOOLS = 1500  # comparison, report, study, and their commands
ASSETS = {
    "make_digits",
    "make_tiny",
    "glyphs",
}  # made the embedded data and model, once; nothing imports them


def test_size():
    counts = {path: code_lines(path) for path in modules() if path.stem not in ASSETS}
    tools = sum(
        n
        for path, n in counts.items()
        if part_of(path) in ("report", "study", "comparison")
        or path.stem in ("compare", "reproduce", "trace", "doctor")
    )
    assert tools <= TOOLS and sum(counts.values()) - tools <= CORE
    assert (
        sum(
            n
            for path, n in counts.items()
            if part_of(path) == "federated" and path.parent.name != "methods"
        )
        <= 800
    )
    long = {
        str(path.relative_to(ROOT)): n
        for path in modules()
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert not long, f"above 300 lines: {long}"


def test_nothing_imports_the_makers_of_assets():
    makers = {
        f"semanticfl_ref.{folder}.{name}" for folder in ("data", "diffusion") for name in ASSETS
    }
    assert not [path for path in modules() if path.stem not in ASSETS and imports(path) & makers]


def test_code_lines_counts_code(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""Doc\nstring."""\n\n# why\nx = """a\nb"""\n\n\ndef f():\n    """Doc."""\n    return x  # here\n'
    )
    assert code_lines(tmp_path / "m.py") == 4


def test_the_kernels_package_is_harmless_and_importable():
    assert imports(ROOT / "kernels" / "__init__.py") == set()
    check = "import semanticfl_ref.kernels as k, pathlib; print(pathlib.Path(k.__file__).resolve())"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str((ROOT / "kernels" / "__init__.py").resolve()), done.stderr


def test_diffusers_and_transformers_import_from_the_root():
    """Both probe for a distribution called `kernels`, and find our folder when the root is on the
    path.
    """
    code = "from diffusers import AutoencoderKL, UNet2DConditionModel; from transformers import CLIPTextModel, CLIPTokenizer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_files_that_a_distribution_needs():
    for name in ("setup.py", "LICENSE", "CITATION.cff", "CHANGELOG.md", ".ci/run"):
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_set_up_names_every_package_and_its_data(tmp_path):
    """`setup.py` lists each sub-package; the kernels come from the folder at the root, once."""
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build",
            "--build-base",
            str(tmp_path),
            "egg_info",
            "--egg-base",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "semanticfl_ref"
    assert {str(p.relative_to(ROOT)) for p in modules()} == {
        str(p.relative_to(built.parent)).replace("semanticfl_ref/kernels", "kernels")
        for p in built.rglob("*.py")
    }
    for file in (
        p
        for p in PACKAGE.rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc") and "kernels" not in p.parts
    ):
        assert (built / file.relative_to(PACKAGE)).is_file(), f"{file} is not packaged"
