"""What no machine, parser or file can hold is refused in one line."""

import errno

import pytest

from semanticfl_ref import cli


@pytest.mark.parametrize(
    "shortage",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("can't start new thread"),
        OSError(errno.EAGAIN, "Resource temporarily unavailable"),
    ],
)
def test_a_shortage_is_no_bug(monkeypatch, capsys, shortage):
    def run(_arguments):
        raise shortage

    monkeypatch.setattr(cli.COMMANDS["config"], "run", run)
    assert cli.main(["config", "list"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory or processes do not suffice" in line and "lower --replicas" in line


@pytest.mark.parametrize(
    "text",
    [
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs",
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config\n\nSet TORCH",
    ],
    ids=["Triton", "torch.compile"],
)
def test_a_machine_without_a_compiler(monkeypatch, capsys, text):
    def run(_arguments):
        raise RuntimeError(text)

    monkeypatch.setattr(cli.COMMANDS["config"], "run", run)
    assert cli.main(["config", "list"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"semanticfl_ref: error: {text[:30]}") and "install gcc" in line
    assert "SEMANTICFL_KERNELS=torch" in line and "diffusion.compile=false" in line


def test_another_runtime_error_is_a_bug(monkeypatch):
    def run(_arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(cli.COMMANDS["config"], "run", run)
    with pytest.raises(RuntimeError):
        cli.main(["config", "list"])


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 10_000, "a = " + "9" * 10_000, "[data]\nname = 1e"]
)
def test_a_configuration_that_no_parser_takes(tmp_path, capsys, text):
    file = tmp_path / "own.toml"
    file.write_text(text)
    assert cli.main(["config", "show", "--config", str(file)]) == 3
    assert f"{file} is not TOML" in capsys.readouterr().err


def test_a_setting_that_is_no_unicode(capsys):
    assert cli.main(["config", "show", "--data-dir", "a\udcff"]) == 2
    assert "data.dir = 'a\\udcff' is not UTF-8" in capsys.readouterr().err
