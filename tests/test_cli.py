"""The command line: speed of --help, every kind of bad input by name, and the small outputs."""

import json
import os
import subprocess
import sys
import time

import pytest
from data.synthetic_archives import cifar_members, sha256, tar_gz
from processes import ROOT, command, environment, run_cli

from semanticfl_ref import cli
from semanticfl_ref.commands.flags import FLAGS
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.tools.report import tables


def refused(capsys, code: int, *arguments: str) -> str:
    """Run in this process; one line of error, nothing on stdout. Returns the line."""
    assert cli.main(list(arguments)) == code
    out, err = capsys.readouterr()
    errors = [
        line
        for line in err.splitlines()
        if not line.startswith("semanticfl_ref: ") or "error: " in line
    ]
    assert out == "" and len(errors) == 1 and errors[0].startswith("semanticfl_ref: error: "), err
    return errors[0]


def test_help_is_instant_and_imports_nothing_heavy():
    check = "import sys; from semanticfl_ref import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: print([m for m in ('torch', 'numpy', 'diffusers', 'tqdm') if m in sys.modules])"
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True
        )
        times.append(time.perf_counter() - began)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert min(times) <= 0.5
    assert all(
        flag in done.stdout
        for flag in [
            *FLAGS,
            "--config",
            "--set",
            "--dry-run",
            "--json",
            "--out",
            "--resume",
            "--offline",
        ]
    )
    assert all(name in done.stdout for name in config.to_flat(config.Config()))


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["trian"], 2, "'train'"),
        ([], 2, "say what to do"),
        (["train", "--dataset", "cifer10"], 2, "'cifar10'"),
        (["train", "--method", "fedavgg"], 2, "'fedavg'"),
        (["train", "--scenario", "nid3"], 2, "'nid"),
        (["train", "--anchors", "shufled"], 2, "'shuffled'"),
        (["train", "--alpa", "1"], 2, "--alpha"),
        (["train", "--clients_per_round=3"], 2, "--clients-per-round"),
        (["train", "nonsense"], 2, "'nonsense'"),
        (["train", "--rounds"], 2, "--rounds"),
        (["train", "--set", "semantic.tua=1"], 2, "'semantic.tau'"),
        (["train", "--set", "semantic.tau"], 2, "section.field=value"),
        (["train", "--alpha", "0"], 2, "partition.alpha = 0.0"),
        (["train", "--alpha", "-1"], 2, "partition.alpha = -1.0"),
        (["train", "--alpha", "much"], 2, "a number"),
        (["train", "--rounds", "0"], 2, "federation.rounds = 0"),
        (["train", "--clients-per-round", "11"], 2, "--clients"),
        (["train", "--anchor-images", "heldout:0"], 2, "heldout:20"),
        (["train", "--config", "absent.toml"], 3, "absent.toml"),
        (["train", "--resume", "absent"], 3, "absent"),
        (["train", "--resume", "a", "--out", "b"], 2, "--out"),
        (["partition", "shwo"], 2, "show"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, code, *arguments)
    assert os.listdir(tmp_path) == []


def test_run_folders_that_cannot_be_made(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert "--resume run" in refused(capsys, 2, "train", "--out", "run")
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(capsys, 2, "train", "--out", "file/run")
    assert "no config.toml" in refused(capsys, 3, "train", "--resume", "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "permission" in refused(capsys, 2, "train", "--out", "other/run")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory and empty caches."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield tmp_path
    assert os.listdir(tmp_path / "cwd") == [], "something was left behind"


def test_more_clients_than_images(capsys, elsewhere):
    assert "5000" in refused(
        capsys, 2, "train", "--dataset", "digits", "--method", "fedavg", "--clients", "5000"
    )


def test_no_network_and_no_data(capsys, elsewhere):
    assert refused(capsys, 5, "train", "--dataset", "cifar10", "--offline")


def test_no_archive_in_the_folder(capsys, elsewhere):
    assert str(elsewhere) in refused(
        capsys, 3, "train", "--dataset", "cifar10", "--data-dir", str(elsewhere / "absent")
    )


def test_damaged_archive(capsys, elsewhere):
    (elsewhere / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b damaged")
    assert "cifar-10-python.tar.gz" in refused(
        capsys, 3, "train", "--dataset", "cifar10", "--data-dir", str(elsewhere)
    )


def test_no_weights(capsys, elsewhere):
    line = refused(
        capsys, 5, "train", "--dataset", "digits", "--sd", config.STABLE_DIFFUSION, "--offline"
    )
    assert "--sd tiny" in line


def test_a_folder_with_an_empty_class(capsys, elsewhere):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (elsewhere / "images" / part / name).mkdir(parents=True)
    assert "cat" in refused(
        capsys,
        3,
        "train",
        "--dataset",
        "folder",
        "--data-dir",
        str(elsewhere / "images"),
        "--method",
        "fedavg",
    )


def test_a_folder_with_a_broken_image(capsys, elsewhere):
    for name in ("cat", "dog"):
        (elsewhere / "images" / name).mkdir(parents=True)
        (elsewhere / "images" / name / "1.png").write_bytes(b"\x89PNG broken")
    assert "cat/1.png is not a readable image" in refused(
        capsys,
        3,
        "train",
        "--dataset",
        "folder",
        "--data-dir",
        str(elsewhere / "images"),
        "--method",
        "fedavg",
    )


@pytest.mark.parametrize("damage", ["differs", "flipped", "truncated", "hostile"])
def test_a_local_archive_that_cannot_be_trusted(capsys, elsewhere, damage):
    """Another content needs its hash; a damaged or hostile one is refused with it, too."""
    members = cifar_members(5)
    if damage == "hostile":
        members["cifar-10-batches-py/test_batch"] = b"cos\nsystem\n(S'touch hostile'\ntR."
    content = bytearray(tar_gz(members))
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path = elsewhere / "cifar-10-python.tar.gz"
    path.write_bytes(content[:-100] if damage == "truncated" else content)
    told = ["--data-sha256", sha256(path.read_bytes())] if damage != "differs" else []
    line = refused(
        capsys,
        3,
        "train",
        "--dataset",
        "cifar10",
        "--data-dir",
        str(elsewhere),
        "--method",
        "fedavg",
        *told,
    )
    assert {
        "differs": "--data-sha256",
        "flipped": "get it again",
        "truncated": "get it again",
        "hostile": "os.system",
    }[damage] in line


def test_offline_trains_without_a_connection(job, elsewhere, monkeypatch):
    """The embedded default with its anchors made rebuild: no connection, no look-up of a name. (Making
    a socket is no crime: a library tries IPv6 out so.)
    """
    for name in ("socket.connect", "socket.connect_ex", "getaddrinfo"):
        monkeypatch.setattr(
            f"socket.{name}", lambda *_, **__: pytest.fail("a connection was opened")
        )
    few = [
        "--method",
        "semanticfl",
        "--rounds",
        "1",
        "--set",
        "diffusion.layers=vae",
        "--set",
        "anchors.width=2",
    ]
    assert cli.main(["train", *job, *few, "--offline", "--out", str(elsewhere / "run")]) == 0


def test_a_dry_run_without_the_data_says_so(capsys, elsewhere):
    assert "--dry-run download nothing" in refused(
        capsys, 5, "train", "--dataset", "cifar10", "--dry-run"
    )


def test_a_held_out_class_must_leave_images(capsys, elsewhere):
    assert "leaves no image" in refused(
        capsys,
        2,
        "train",
        "--dataset",
        "digits",
        "--method",
        "fedavg",
        "--anchor-images",
        "heldout:100000",
    )


def test_cuda_where_there_is_none(capsys, elsewhere):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "run.device" in refused(
        capsys, 2, "train", "--dataset", "digits", "--method", "fedavg", "--set", "run.device=cuda"
    )


def test_a_user_error_has_no_traceback_in_a_process_of_its_own():
    done = run_cli("train", "--dataset", "cifer10")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("semanticfl_ref: error: unknown dataset 'cifer10'")
        and done.stderr.count("\n") == 1
    )


def test_a_broken_pipe_is_quiet():
    process = subprocess.Popen(
        command("config", "show"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_config_show_is_read_back(capsys, tmp_path):
    assert (
        cli.main(
            [
                "config",
                "show",
                "--dataset",
                "cifar100",
                "--alpha",
                "0.5",
                "--set",
                "semantic.tau=0.07",
            ]
        )
        == 0
    )
    (tmp_path / "c.toml").write_text(capsys.readouterr().out)
    shown = config.build(file=tmp_path / "c.toml")
    assert (shown.data.name, shown.partition.alpha, shown.semantic.tau) == ("cifar100", 0.5, 0.07)
    assert cli.main(["config", "show", "--config", str(tmp_path / "c.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == config.to_flat(shown)


def test_partition_show(capsys):
    assert (
        cli.main(
            [
                "partition",
                "show",
                "--dataset",
                "digits",
                "--clients",
                "4",
                "--clients-per-round",
                "2",
            ]
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    assert (
        cli.main(
            [
                "partition",
                "show",
                "--dataset",
                "digits",
                "--clients",
                "4",
                "--clients-per-round",
                "2",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["scenario"] == "nid1"


def test_dry_run_prints_sizes_and_writes_nothing(capsys, elsewhere, job):
    assert cli.main(["train", *job, "--dry-run", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert (sizes["clients"], sizes["clients_per_round"], sizes["bytes_up_per_round"]) == (
        3,
        2,
        2 * 4 * sizes["row_entries"],
    )
    assert sum(sizes["client_images"]) == sizes["images"]["train"]
    assert cli.main(["train", *job, "--dry-run", "--method", "semanticfl"]) == 0
    assert "steps a round" in capsys.readouterr().out


def test_first_line_within_two_seconds(elsewhere):
    began = time.perf_counter()
    process = subprocess.Popen(
        command("train", "--out", str(elsewhere / "run")),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    line = process.stderr.readline()
    waited = time.perf_counter() - began
    process.kill()
    process.communicate()
    assert b"loading torch" in line and waited <= 2.0


def test_what_to_try_next_can_be_typed():
    settings = config.build(
        {"data.name": "folder", "data.dir": "my images", "federation.method": "fedavg"}
    )
    assert "train --dataset folder --data-dir 'my images' --method semanticfl " in tables.try_next(
        settings
    )


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40 * 3, "3.0 TiB")]
)
def test_sizes_for_a_reader(count, text):
    assert tables.size(count) == text
