"""Results as JSON files that say what made them: device, versions, date, and which kernels."""

import ast
import datetime
import hashlib
import json
import os
import platform
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
KERNELS = ROOT / "kernels"
SCHEMA = 1


class Record:
    """A dictionary that is on the disk after every change: a run that is cut short loses nothing of
    what it had done.

    Processes may use one file one after another, not at once.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.content = (
            json.loads(self.path.read_text(encoding="utf-8"))
            if self.path.exists()
            else {"schema": SCHEMA}
        )

    def set(self, name: str, value) -> None:
        """Store one entry."""
        self.content[name] = value
        self._write()

    def add(self, name: str, row: dict) -> None:
        """Append a row to a list."""
        self.content.setdefault(name, []).append(row)
        self._write()

    def stage(self, name: str, **status) -> None:
        """Store how a stage went."""
        self.content.setdefault("stages", {})[name] = status
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        beside.write_text(
            json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.replace(beside, self.path)


def versions() -> dict:
    """Python, torch, Triton and CUDA of this process, and the date."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except Exception as error:
        triton_version = f"none ({type(error).__name__})"
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "kernels": kernels_digest(),
    }


def kernels_digest(folder: Path = KERNELS) -> str:
    """Sixteen hexadecimal digits that change with the code of the kernels, not with its comments
    and docstrings, nor with Python's version.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(
            f"{path.name} {_code_of(ast.parse(path.read_text(encoding='utf-8')))}\n".encode()
        )
    return digest.hexdigest()[:16]


def _code_of(node) -> str:
    """A syntax tree as text. Neither ast.dump nor ast.unparse writes the same in each version of
    Python.
    """
    if isinstance(node, list):
        return f"[{' '.join(_code_of(one) for one in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if (
        isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and ast.get_docstring(node, clean=False) is not None
    ):
        fields["body"] = node.body[1:]
    written = (
        f"{name}={_code_of(value)}"
        for name, value in fields.items()
        if value is not None and value != []
    )
    return f"{type(node).__name__}({' '.join(written)})"
