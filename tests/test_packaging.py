"""What the repository promises of itself: imports along the arrows, size, form, packaging."""

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
# A module may import from its own part and from those before it.
ARROWS = [
    ("errors", "formatting", "cores", "parent"),
    ("randomness", "storage", "config"),
    ("device",),
    ("kernels",),
    ("data",),
    ("diffusion",),
    ("federated",),
    ("run",),
    ("tools",),
    ("commands",),
    ("cli", "__init__", "__main__"),
]
LEVEL = {part: level for level, parts in enumerate(ARROWS) for part in parts}
WITHOUT_TORCH = {"semanticfl_ref/run/folder.py", "semanticfl_ref/run/summary.py"}
# Tokens of formatted code, without comments and docstrings: a long line does not cheat this.
BUDGET = {"semanticfl_ref": 99_000, "kernels": 10_000, "bench": 22_200}
STORY = ("round", "client", "losses", "aggregate", "flat", "model", "methods/semanticfl")
STORY_LINES, FILE_LINES, FUNCTION_LINES, PARAMETERS = 800, 400, 60, 8


def files(folder: Path) -> list[Path]:
    """The Python files below a folder; links are not followed."""
    return sorted(p for p in folder.rglob("*.py") if not p.is_symlink())


def modules() -> list[Path]:
    """Every module of the installed package."""
    own = [p for p in files(PACKAGE) if p.relative_to(PACKAGE).parts[0] != "kernels"]
    return own + files(ROOT / "kernels")


def part_of(path: Path) -> str:
    if ROOT / "kernels" in path.parents:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "semanticfl_ref"
            found |= {f"{node.module}.{a.name}" for a in node.names} if whole else {node.module}
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_along_the_arrows(path):
    part = part_of(path)
    for name in imports(path):
        if name.startswith("semanticfl_ref."):
            other = name.split(".")[1]
            if other == "__version__":
                continue
            assert LEVEL[other] <= LEVEL[part], f"{other} comes after {part}"
            assert part != "kernels" or other == "kernels", "kernels import torch and triton only"
        elif part == "kernels":
            allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
        if part == "config" or name_of(path) in WITHOUT_TORCH:
            assert name.split(".")[0] != "torch", f"{path.name} must not need torch"


def tokens(path: Path) -> int:
    """Tokens of code, without comments, docstrings and layout; a string is one, whatever is in it.

    From Python 3.12 on, the tokenizer takes f-strings apart: of each, the outermost start counts.
    """
    layout = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
        *(tokenize.ENCODING, tokenize.ENDMARKER),
    }
    opening, closing = (getattr(tokenize, f"FSTRING_{part}", None) for part in ("START", "END"))
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings.add((node.body[0].value.lineno, node.body[0].value.col_offset))
    count, depth = 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        counts = token.type not in layout and token.start not in docstrings
        count += counts and depth == 0
        depth += (token.type == opening) - (token.type == closing)
    return count


@pytest.mark.parametrize("folder", BUDGET)
def test_size_in_tokens(folder):
    own = [p for p in files(ROOT / folder) if "kernels" not in p.parts or folder == "kernels"]
    total = sum(map(tokens, own))
    assert total <= BUDGET[folder], f"{folder} has {total} tokens"


def test_tokens_counts_code(tmp_path):
    code = (
        '"""Doc\nstring."""\n\n# why\nx = """a\nb"""\n\n\ndef f():\n    """Doc."""\n    return x\n'
        "y = f'{x!r:>{len(x)}} and {x}' 'more'\n"
    )
    (tmp_path / "m.py").write_text(code)
    assert tokens(tmp_path / "m.py") == 3 + 5 + 2 + 4


def test_the_story_is_short():
    lines = 0
    for name in STORY:
        text = (PACKAGE / "federated" / f"{name}.py").read_text(encoding="utf-8")
        lines += len(text.splitlines())
    assert lines <= STORY_LINES


EVERYTHING = [*modules(), *files(ROOT / "bench"), *files(ROOT / "scripts"), *files(ROOT / "tests")]


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_form(path):
    """Short files; in the package also short functions with few parameters."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    if PACKAGE not in path.parents:
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        documented = ast.get_docstring(node) is not None
        first = node.body[1 if documented and len(node.body) > 1 else 0].lineno
        assert node.end_lineno - first < FUNCTION_LINES, f"{node.name} is long"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = len([a for a in arguments if a.arg not in ("self", "cls")])
        assert count <= PARAMETERS, f"{node.name} has {count} parameters"


def test_the_kernels_package_is_harmless_and_importable():
    assert imports(ROOT / "kernels" / "__init__.py") == set()
    check = (
        "import semanticfl_ref.kernels as kernels, pathlib; "
        "print(pathlib.Path(kernels.__file__).resolve())"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    expected = (ROOT / "kernels" / "__init__.py").resolve()
    assert done.stdout.strip() == str(expected), done.stderr


def test_diffusers_and_transformers_import_from_the_root():
    """Both probe for a distribution called `kernels`, and find our folder if the root is on the
    path."""
    code = (
        "from diffusers import AutoencoderKL, UNet2DConditionModel; "
        "from transformers import CLIPTextModel, CLIPTokenizer"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_files_that_a_distribution_needs():
    for name in ("setup.py", "LICENSE", "CITATION.cff", "CHANGELOG.md", ".ci/run"):
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_setup_names_every_package_and_its_data(tmp_path):
    """`setup.py` lists each sub-package; the kernels come from the folder at the root, once."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    command += ["egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "semanticfl_ref"
    found = {
        str(p.relative_to(built.parent)).replace("semanticfl_ref/kernels", "kernels")
        for p in built.rglob("*.py")
    }
    assert found == set(map(name_of, modules()))
    for file in PACKAGE.rglob("*"):
        is_data = file.is_file() and file.suffix not in (".py", ".pyc")
        if is_data and "kernels" not in file.parts:
            assert (built / file.relative_to(PACKAGE)).is_file(), f"{file} is not packaged"
