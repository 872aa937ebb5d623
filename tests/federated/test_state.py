"""The state of a run and its checkpoint."""

from dataclasses import replace

import pytest
import torch
from quadratic import run_rounds

from semanticfl_ref.errors import DataError, MismatchError
from semanticfl_ref.federated.state import initial_state, load_checkpoint, save_checkpoint


def test_checkpoint_is_the_same_bytes_and_every_damage_is_found(small_context, tmp_path):
    state, _ = run_rounds(small_context(), rounds=1)
    path, identity = tmp_path / "checkpoint.safetensors", {"seed": 0, "data": "abc"}
    save_checkpoint(path, state, identity)
    content = path.read_bytes()
    save_checkpoint(path, state, identity)
    assert path.read_bytes() == content
    assert torch.equal(load_checkpoint(path, identity).params, state.params)
    source = torch.Generator().manual_seed(0)
    anywhere = torch.randint(0, len(content), (60,), generator=source).tolist()
    for position in [*anywhere, *range(0, 600, 7)]:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path, identity)
        except MismatchError:
            continue
        # A flip in the header's padding is harmless.
        assert torch.equal(loaded.params, state.params)
        assert loaded.round == state.round
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(MismatchError, match="damaged"):
            load_checkpoint(path, identity)


def test_checkpoint_of_another_run_lists_what_differs(small_context, tmp_path):
    save_checkpoint(tmp_path / "c", initial_state(small_context()), {"seed": 0, "alpha": 0.3})
    with pytest.raises(MismatchError, match=r"alpha: 0\.3 there, 0\.5 here"):
        load_checkpoint(tmp_path / "c", {"seed": 0, "alpha": 0.5})


def test_disk_full_keeps_the_last_checkpoint(small_context, tmp_path, monkeypatch):
    state = initial_state(small_context())
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state, {})
    content = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"checkpoint\.safetensors: No space left"):
        save_checkpoint(path, replace(state, round=7), {})
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_setting_that_a_file_does_not_know_had_its_default(small_context, tmp_path):
    """An earlier version wrote it; another value than the default is another run."""
    save_checkpoint(tmp_path / "c", initial_state(small_context()), {"run.seed": 3})
    ours = {"run.seed": 3, "federation.schedule": "constant"}
    assert load_checkpoint(tmp_path / "c", ours).round == 0
    with pytest.raises(MismatchError, match="schedule: 'constant' there, 'step' here"):
        load_checkpoint(tmp_path / "c", {**ours, "federation.schedule": "step"})
