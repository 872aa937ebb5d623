"""A round watched on the embedded default, once for all tests of this folder."""

import contextlib
import io
from types import SimpleNamespace

import pytest
from rounds import parsed

from semanticfl_ref import cli
from semanticfl_ref.commands.trace import SMALL
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.run.setup import build_anchors, load_data


@pytest.fixture(scope="session")
def default(tmp_path_factory) -> SimpleNamespace:
    """`trace --json --html` with nothing else: the document and the page."""
    config = resolve(SMALL)
    build_anchors(config, load_data(config, offline=True), offline=True)  # not while it is watched
    out, page = io.StringIO(), tmp_path_factory.mktemp("page") / "round.html"
    with contextlib.redirect_stdout(out):
        assert cli.main(["trace", "--json", "--html", str(page), "--offline"]) == 0
    return SimpleNamespace(document=parsed(out.getvalue()), page=page)
