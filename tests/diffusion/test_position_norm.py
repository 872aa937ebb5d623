"""FedDifRC's pooling: PCA at every position, norms over positions, one basis for all captions."""

import pytest
import torch

from semanticfl_ref.config.anchor_settings import AnchorsSettings, DiffusionSettings
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.diffusion.anchors import make_anchors
from semanticfl_ref.diffusion.extract import open_or_build
from semanticfl_ref.diffusion.feature_cache import BASIS
from semanticfl_ref.diffusion.position_norm import fit_basis, position_norm
from semanticfl_ref.errors import DataError, MismatchError, UserError

OPTIONS = {"timestep": 150, "seed": 3}
NORM = {"pooling": "norm", "layers": "mid,up.0"}


def test_norms_of_principal_components_on_numbers():
    """Two channels at four positions: (3, 0), (-3, 0), (0, 1), (0, -1) about the mean (5, 7). The
    components are the channels themselves; their norms sqrt(18) and sqrt(2)."""
    at_positions = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]) + torch.tensor([5.0, 7.0])

    class Model:
        def features(self, images, *, prompt_embedding, reduce):
            return {"up.1": reduce("up.1", images), "vae": None}

    maps = at_positions.T.reshape(1, 2, 2, 2)
    basis = fit_basis(Model(), maps, None)
    found = position_norm(basis, torch.device("cpu"))("up.1", maps)
    torch.testing.assert_close(found, torch.tensor([[18.0, 2.0]]).sqrt())


def test_components_keep_what_the_channels_have(backbone, images):
    """A rotation at every position keeps each image's sum of squares about the mean."""
    basis = fit_basis(backbone, images, backbone.null_prompt, **OPTIONS)
    reduce = position_norm(basis, torch.device("cpu"))
    normed = backbone.features(images, reduce=reduce, **OPTIONS)
    maps = backbone.features(images, reduce=lambda _, values: values, **OPTIONS)
    for layer in ("mid", "up.0"):
        centred = maps[layer] - maps[layer].mean((0, 2, 3), keepdim=True)
        total = centred.square().sum((1, 2, 3))
        torch.testing.assert_close(normed[layer].square().sum(1), total, rtol=1e-4, atol=1e-3)
        components = normed[layer].square().sum(0)
        assert (components[:-1] >= components[1:] * (1 - 1e-4)).all(), "by variance, descending"
    assert torch.equal(normed["vae"], backbone.features(images, **OPTIONS)["vae"])


def test_the_cache_keeps_its_basis_and_resumes_with_it(plan_for, tmp_path, monkeypatch):
    whole, resumed = plan_for(tmp_path / "a", **NORM), plan_for(tmp_path / "b", **NORM)
    features = open_or_build(whole)
    resumed.path.mkdir(parents=True)
    for file in [*whole.files[:1], whole.basis]:  # what a killed extraction leaves
        (resumed.path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("semanticfl_ref.diffusion.extract.fit_basis", None)
    again = open_or_build(resumed)
    assert torch.equal(again.read("up.0"), features.read("up.0"))
    assert (features.read("mid") >= 0).all()
    assert whole.id != plan_for(tmp_path, layers="mid,up.0").id


def test_without_its_basis_no_shard_is_kept(plan_for, tmp_path):
    plan = plan_for(tmp_path, **NORM)
    expected = open_or_build(plan).read("up.0")
    plan.basis.unlink()
    with pytest.raises(MismatchError, match=f"{BASIS} is damaged"):
        open_or_build(plan)
    (plan.path / "manifest.json").unlink()
    times = [file.stat().st_mtime_ns for file in plan.shards]
    assert torch.equal(open_or_build(plan).read("up.0"), expected)
    assert all(f.stat().st_mtime_ns > t for f, t in zip(plan.shards, times, strict=True))


def test_texts_are_in_the_basis_of_the_images(plan_for, tmp_path):
    visual = plan_for(tmp_path, **NORM)
    texts = plan_for(tmp_path, every_class=True, basis=visual.id, **NORM)
    with pytest.raises(DataError, match=BASIS):
        open_or_build(texts)
    sources = open_or_build(visual), open_or_build(texts)
    assert not (texts.path / BASIS).exists()
    settings = AnchorsSettings(width=24, aggregation="16-8", whiten=False, text="unet")
    anchors = make_anchors(sources[0], settings, classes=3, seed=0, text_source=sources[1])
    expected = torch.cat([sources[0].read("mid")[:, :16], sources[0].read("up.0")[:, :8]], 1)
    assert torch.equal(anchors.visual, expected.float()), "the norms themselves, not centred"
    assert anchors.text.shape == (12, 3, 24) and (anchors.text >= 0).all()
    too_wide = AnchorsSettings(width=1000, aggregation="500-500", whiten=False)
    with pytest.raises(UserError, match="layer mid has 112 PCA components"):
        make_anchors(sources[0], too_wide, classes=3, seed=0)


def test_feddifrc_has_it_on_the_papers_data_sets():
    config = resolve({"data.name": "cifar10", "federation.method": "feddifrc"})
    assert (config.diffusion.pooling, config.anchors.whiten) == ("norm", False)
    assert resolve({"data.name": "cifar10"}).diffusion.pooling == "mean"
    assert resolve({"federation.method": "feddifrc"}).diffusion.pooling == "mean"
    with pytest.raises(UserError, match=r"leave out diffusion\.pool = 2"):
        DiffusionSettings(pooling="norm", pool=2)
