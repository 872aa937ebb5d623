"""The command line: speed of --help, bad input, and small outputs."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from data.synthetic_archives import cifar_members, sha256, tar_gz
from processes import ROOT, command, environment, run_cli

from semanticfl_ref import cli
from semanticfl_ref.commands.train import try_next
from semanticfl_ref.config.command_line import FLAGS
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import STABLE_DIFFUSION, setting_fields, to_flat
from semanticfl_ref.formatting import format_bytes, format_percent

HELP = """
import sys
from semanticfl_ref import cli
try:
    cli.main([*sys.argv[1:], "--help"])
except SystemExit:
    print([m for m in ("torch", "numpy", "diffusers", "tqdm") if m in sys.modules])
"""


def refused(capsys, code: int, *arguments: str) -> str:
    """Run in this process; expect one line of error, nothing on stdout. Returns the line."""
    assert cli.main(list(arguments)) == code
    out, err = capsys.readouterr()
    progress = "semanticfl_ref: "
    errors = [
        line for line in err.splitlines() if not line.startswith(progress) or "error: " in line
    ]
    assert out == ""
    assert len(errors) == 1, err
    assert errors[0].startswith("semanticfl_ref: error: "), err
    return errors[0]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_instant_and_imports_nothing_heavy(name):
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", HELP, name], cwd=ROOT, capture_output=True, text=True
        )
        times.append(time.perf_counter() - began)
        if times[-1] <= 0.5:
            break
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert min(times) <= 0.5


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_values_that_will_be_used(capsys):
    """For the data set given; those of the embedded default without one."""
    embedded = help_of(capsys, "train")
    others = ("--config", "--set", "--dry-run", "--json", "--out", "--resume", "--offline")
    assert all(flag in embedded for flag in (*FLAGS, *others))
    assert "number of communication rounds (federation.rounds; default: 40)" in embedded
    assert "(federation.learning_rate; default: 0.1)" in embedded
    paper = help_of(capsys, "train", "--dataset", "cifar10", "--set", "federation.rounds=7")
    assert "number of communication rounds (federation.rounds; default: 7)" in paper
    assert "(federation.learning_rate; default: 0.01)" in paper
    mistaken = help_of(capsys, "train", "--dataset", "cifer10")
    assert "default: 40" in mistaken


def test_config_list_shows_every_setting_once(capsys):
    assert cli.main(["config", "list", "--dataset", "cifar100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, value in to_flat(resolve({"data.name": "cifar100"})).items():
        assert lines.count(f"{name} = {value}") == 1
    for name in setting_fields():
        assert sum(line.startswith(f"{name} = ") for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("trian", 2, "'train'"),
        ("", 2, "no command given; choose one of: train"),
        ("train --dataset cifer10", 2, "'cifar10'"),
        ("train --method fedavgg", 2, "'fedavg'"),
        ("train --scenario nid3", 2, "'nid"),
        ("train --anchors shufled", 2, "'shuffled'"),
        ("train --alpa 1", 2, "--alpha"),
        ("train --clients_per_round=3", 2, "--clients-per-round"),
        ("train --gpus 2", 2, "--device cuda"),
        ("train --batchsize 2", 2, "--batch-size"),
        ("train --learning-rate 2", 2, "--lr"),
        ("train --epochs 2", 2, "--local-epochs"),
        ("train --semanticfl.tau 1", 2, "use --set semanticfl.tau=..."),
        ("compare --at x", 2, "such as 40,80"),
        ("compare --method fedavg", 2, "list the methods with --methods A,B"),
        ("compare --seed 1", 2, "--seeds N runs N seeds, the first of which is --first-seed"),
        ("config lst", 2, "argument list|show: invalid choice: 'lst'"),
        ("train nonsense", 2, "'nonsense'"),
        ("train --rounds", 2, "--rounds"),
        ("train --set semanticfl.tua=1", 2, "'semanticfl.tau'"),
        ("train --set semanticfl.tau", 2, "section.field=value"),
        ("train --set federation.lr=1", 2, "'federation.learning_rate'"),
        ("train --alpha 0", 2, "partition.alpha = 0.0"),
        ("train --alpha -1", 2, "partition.alpha = -1.0"),
        ("train --alpha much", 2, "a number"),
        ("train --rounds 0", 2, "federation.rounds = 0"),
        ("train --clients-per-round 11", 2, "--clients"),
        ("train --anchor-images heldout:0", 2, "heldout:20"),
        ("train --config absent.toml", 3, "absent.toml"),
        ("train --resume absent", 3, "absent"),
        ("train --resume a --out b", 2, "--out"),
        ("partition shwo", 2, "show"),
        ("export absent --out m.pt2", 3, "absent"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    capsys, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, code, *arguments.split())
    assert os.listdir(tmp_path) == []


def test_run_folders_that_cannot_be_made(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("")  # an empty folder is taken
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
    few = ("train", "--dataset", "digits", "--method", "fedavg", "--clients", "5000")
    assert "5000" in refused(capsys, 2, *few)


def test_no_network_and_no_data(capsys, elsewhere):
    assert refused(capsys, 5, "train", "--dataset", "cifar10", "--offline")


def test_no_archive_in_the_folder(capsys, elsewhere):
    absent = str(elsewhere / "absent")
    line = refused(capsys, 3, "train", "--dataset", "cifar10", "--data-dir", absent)
    assert str(elsewhere) in line


def test_damaged_archive(capsys, elsewhere):
    (elsewhere / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b damaged")
    line = refused(capsys, 3, "train", "--dataset", "cifar10", "--data-dir", str(elsewhere))
    assert "cifar-10-python.tar.gz" in line


def test_no_weights(capsys, elsewhere):
    given = ("--dataset", "digits", "--sd", STABLE_DIFFUSION, "--offline")
    assert "--sd tiny" in refused(capsys, 5, "train", *given)


def image_folder(folder) -> tuple[str, ...]:
    """The arguments to train on a folder of class folders."""
    given = ("--dataset", "image_folder", "--data-dir", str(folder), "--method", "fedavg")
    return ("train", *given)


def test_a_folder_with_an_empty_class(capsys, elsewhere):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (elsewhere / "images" / part / name).mkdir(parents=True)
    assert "cat" in refused(capsys, 3, *image_folder(elsewhere / "images"))


def test_a_folder_with_a_broken_image(capsys, elsewhere):
    for name in ("cat", "dog"):
        (elsewhere / "images" / name).mkdir(parents=True)
        (elsewhere / "images" / name / "1.png").write_bytes(b"\x89PNG broken")
    line = refused(capsys, 3, *image_folder(elsewhere / "images"))
    assert "cat/1.png is not a readable image" in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("differs", "--data-sha256"),
        ("flipped", "again"),
        ("truncated", "again"),
        ("hostile", "os.system"),
    ],
)
def test_a_local_archive_that_cannot_be_trusted(capsys, elsewhere, damage, message):
    """Other content needs its SHA-256; damaged or hostile content is refused even with it."""
    members = cifar_members(5)
    if damage == "hostile":
        members["cifar-10-batches-py/test_batch"] = b"cos\nsystem\n(S'touch hostile'\ntR."
    content = bytearray(tar_gz(members))
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path = elsewhere / "cifar-10-python.tar.gz"
    path.write_bytes(content[:-100] if damage == "truncated" else content)
    arguments = ["--dataset", "cifar10", "--data-dir", str(elsewhere), "--method", "fedavg"]
    if damage != "differs":
        arguments += ["--data-sha256", sha256(path.read_bytes())]
    assert message in refused(capsys, 3, "train", *arguments)


def test_offline_trains_without_a_connection(job, elsewhere, monkeypatch):
    """The embedded default with anchors built anew: no connection, no name lookup. (Making a socket
    is fine: a library probes IPv6 that way.)"""
    for name in ("socket.connect", "socket.connect_ex", "getaddrinfo"):
        monkeypatch.setattr(
            f"socket.{name}", lambda *_, **__: pytest.fail("a connection was opened")
        )
    few = ["--method", "semanticfl", "--rounds", "1", "--out", str(elsewhere / "run")]
    few += ["--set", "diffusion.layers=vae", "--set", "anchors.width=2"]
    assert cli.main(["train", *job, *few, "--offline"]) == 0


def test_a_dry_run_without_the_data_says_so(capsys, elsewhere):
    line = refused(capsys, 5, "train", "--dataset", "cifar10", "--dry-run")
    assert "--dry-run download nothing" in line


def test_held_out_images_must_leave_images(capsys, elsewhere):
    given = ("--dataset", "digits", "--method", "fedavg", "--anchor-images", "heldout:100000")
    assert "leaves no image" in refused(capsys, 2, "train", *given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys, elsewhere):
    given = ("--dataset", "digits", "--method", "fedavg", "--device", "cuda")
    assert "run.device" in refused(capsys, 2, "train", *given)


def test_a_user_error_has_no_traceback_in_a_process_of_its_own():
    done = run_cli("train", "--dataset", "cifer10")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("semanticfl_ref: error: unknown data.name 'cifer10'")
    assert done.stderr.count("\n") == 1


def test_a_broken_pipe_is_quiet():
    process = subprocess.Popen(
        command("config", "show"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_config_show_is_read_back(capsys, tmp_path):
    given = ["--dataset", "cifar100", "--alpha", "0.5", "--set", "semanticfl.tau=0.07"]
    assert cli.main(["config", "show", *given]) == 0
    (tmp_path / "c.toml").write_text(capsys.readouterr().out)
    shown = resolve(file=tmp_path / "c.toml")
    assert shown.data.name == "cifar100"
    assert shown.partition.alpha == 0.5
    assert shown.method.tau == 0.07
    assert cli.main(["config", "show", "--config", str(tmp_path / "c.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == to_flat(shown)


def test_partition_show(capsys):
    given = ["partition", "show", "--dataset", "digits", "--clients", "4"]
    given += ["--clients-per-round", "2"]
    assert cli.main(given) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 + 4
    assert cli.main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scenario"] == "nid1"


def test_dry_run_prints_sizes_and_writes_nothing(capsys, elsewhere, job):
    assert cli.main(["train", *job, "--dry-run", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert (sizes["clients"], sizes["clients_per_round"]) == (3, 2)
    assert sizes["bytes_up_per_round"] == 2 * 4 * sizes["parameters"]
    assert sum(sizes["client_images"]) == sizes["images"]["train"]
    assert cli.main(["train", *job, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "anchors" not in out and "features" not in out
    for setting, told in (("fedprox.mu=1", True), ("server.momentum=0.5", False)):
        assert cli.main(["train", *job, "--dry-run", "--set", setting]) == 0
        assert ("note: fedavg does not read fedprox.mu\n" in capsys.readouterr().err) == told
    semanticfl = ["train", *job, "--dry-run", "--method", "semanticfl"]
    assert cli.main([*semanticfl, "--sd", "somebody/model"]) == 0
    assert "visual cache: time unknown: the model is not on this" in capsys.readouterr().out
    assert cli.main(semanticfl) == 0
    out = capsys.readouterr().out
    assert "features         visual cache: about " in out and "to make on this machine, 98.4" in out
    assert "steps per round" in out and out.endswith("back; plus each client's anchors, once\n")


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
    assert b"loading torch" in line
    assert waited <= 2.0


def test_what_to_try_next_keeps_the_users_settings():
    """Only the method differs, so that the two runs can be compared."""
    config = resolve(
        {
            "data.name": "image_folder",
            "data.dir": "my images",
            "diffusion.source": "tiny",
            "federation.method": "fedavg",
            "federation.rounds": 7,
            "model.width": 4,
            "run.seed": 3,
        }
    )
    command = try_next(config).splitlines()[0]
    for flag in ("--dataset image_folder", "--data-dir 'my images'", "--sd tiny", "--rounds 7"):
        assert flag in command
    for flag in ("--width 4", "--seed 3", "--method semanticfl"):
        assert flag in command


def test_what_to_try_next_after_another_method():
    """The paper's setting is that of FedAvg and SemanticFL."""
    lines = [try_next(resolve({"federation.method": name})) for name in ("semanticfl", "moon")]
    assert "cifar10" in lines[0]
    assert "cifar10" not in lines[1] and lines[1].endswith("(for comparison)")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40 * 3, "3.0 TiB")]
)
def test_bytes_for_a_reader(count, text):
    assert format_bytes(count) == text


def test_per_cent_for_a_reader():
    assert format_percent(0.1234) == "12.3%"
    assert format_percent(None) == ""
