"""Result files: JSON that says what made it: device, versions, date, commit, and which kernels."""

import ast
import datetime
import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
KERNELS = ROOT / "kernels"


class Record:
    """A dictionary that is written to its file after every change, so that a run that is cut short
    keeps what it had measured.

    Several processes may use a file one after another, not at once.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.content = {}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def set(self, name: str, value) -> None:
        """Store an entry."""
        self.content[name] = value
        self._write()

    def add(self, name: str, row: dict) -> None:
        """Append a row to a list."""
        self.content.setdefault(name, []).append(row)
        self._write()

    def stage(self, name: str, **status) -> None:
        """Store the status of a stage."""
        self.content.setdefault("stages", {})[name] = status
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(
            json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.replace(partial, self.path)


def versions() -> dict:
    """Date, commit, versions of this process's libraries, and the digest of the kernels."""
    try:
        import triton

        triton_version = triton.__version__
    except Exception as error:  # a broken installation raises more than ImportError
        triton_version = f"none ({type(error).__name__})"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "kernels": kernels_digest(),
    }


def commit() -> str | None:
    """The checkout's commit; None if that is unknown."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def kernels_digest(folder: Path = KERNELS) -> str:
    """Sixteen hexadecimal digits that change with what runs on the device or launches it.

    That is, with `launch`, the functions under @triton.jit, and what they use of their file; not
    with comments, docstrings or the version of Python.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        named = {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for target in getattr(node, "targets", [node]):
                named[getattr(target, "name", getattr(target, "id", None))] = node
        wanted = {name for name, node in named.items() if name == "launch" or _is_compiled(node)}
        found = set()
        while wanted:
            found |= wanted
            used = (n for name in wanted for n in ast.walk(named[name]) if isinstance(n, ast.Name))
            wanted = {name.id for name in used if name.id in named} - found
        for name in sorted(found):
            digest.update(f"{path.name} {name} {_code_of(named[name])}\n".encode())
    return digest.hexdigest()[:16]


def _is_compiled(node: ast.AST) -> bool:
    return any("jit" in ast.dump(each) for each in getattr(node, "decorator_list", []))


def _code_of(node) -> str:
    """A syntax tree as text; ast.dump and ast.unparse differ between versions of Python."""
    if isinstance(node, list):
        return f"[{' '.join(_code_of(one) for one in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    if documented and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    written = (f"{k}={_code_of(v)}" for k, v in fields.items() if v is not None and v != [])
    return f"{type(node).__name__}({' '.join(written)})"
