"""The menu of client models: sizes that their publications give, levels, and the contract of one's
own."""

from dataclasses import replace

import pytest
import torch
from quadratic import run_rounds

from semanticfl_ref import ClientModel
from semanticfl_ref.config.registry import MODELS, register_model
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.build_model import build_model
from semanticfl_ref.federated.flat import flat_layout
from semanticfl_ref.federated.model import ResNet10
from semanticfl_ref.federated.networks import ConvNet, MobileNetV2, ResNet18

MENU = ("resnet10", "resnet18", "cnn", "mobilenet")


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_fedavgs_network_has_its_published_size():
    """McMahan et al. 2017: 1 663 370 parameters for 28x28 grey images; ours reads three channels,
    which are 2 * 25 weights more for each of 32 filters."""
    assert parameters(ConvNet(64, 10, norm="none", image_size=28)) == 1_663_370 + 1_600


def test_resnet18_has_the_size_of_resnet18_for_small_images():
    """torchvision's has 11 689 512 for 1000 classes; a stem of 3x3 instead of 7x7 has 64 * 3 * 40
    fewer weights, ten classes 990 * 513 fewer."""
    assert parameters(ResNet18(64, 10)) == 11_689_512 - 7_680 - 990 * 513


def test_mobilenet_has_the_size_of_mobilenet():
    """torchvision's has 3 504 872 for 1000 classes; 512 instead of 1280 features have 768 * (320 +
    2) fewer weights and in the classifier 1000 * 1281 - 10 * 513."""
    assert parameters(MobileNetV2(64, 10)) == 3_504_872 - 768 * 322 - (1_281_000 - 5_130)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", MENU)
def test_every_model_with_every_norm(small_context, name, norm):
    """Levels change no bit, features are what `feature_width` says, and two rounds train."""
    context = small_context(
        model__name=name,
        model__norm=norm,
        federation__method="fedrcl",
        federation__learning_rate=0.01,
    )
    model = context.model.eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, features = model(images)
    again, same, *levels = model.forward_with_levels(images)
    assert torch.equal(logits, again)
    assert torch.equal(features, same)
    assert features.shape == (4, 16)
    assert torch.equal(model.activation(levels[-1]), features) == (name == "cnn")
    assert len(levels) == {"cnn": 3, "mobilenet": 9}.get(name, 5)
    assert all(level.shape[0] == 4 and level.ndim == 2 for level in levels)
    assert (len(context.layout.batch_norm) > 0) == (norm == "batch")
    start = {key: value.clone() for key, value in model.named_parameters()}
    _, lines = run_rounds(context, 2)
    assert all(line["loss"] > 0 for line in lines)
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, start[key])]
    assert len(moved) == len(start)


@pytest.mark.parametrize("name", MENU)
def test_initial_weights_come_from_the_seed_alone(name):
    config = resolve({"model.name": name, "model.width": 4, "model.norm": "none"})
    torch.manual_seed(1)
    first = build_model(config, 3, 32).state_dict()
    torch.manual_seed(2)
    again = build_model(config, 3, 32, visual_width=5).state_dict()
    other = build_model(replace(config, run=replace(config.run, seed=1)), 3, 32).state_dict()
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        assert not torch.equal(value, other[key]) or not value.any(), key


def test_two_blocks_per_stage_give_the_levels_of_a_stage():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = ResNet18(2, 3).eval()
    _, features, *levels = model.forward_with_levels(images)
    assert [level.shape[1] for level in levels] == [2, 2, 4, 8, 16]
    assert len(model.stages) == 8
    assert (levels[-1] <= features + 1e-6).all()
    assert len(ResNet10(2, 3).stages) == 4


class Own(ClientModel):
    """One convolution."""

    @staticmethod
    def feature_width(width):
        return 3 * width

    def layers(self, width, norm, image_size):
        self.only = torch.nn.Conv2d(3, 3 * width, 3)

    def levels(self, images):
        yield self.only(images)


class Wrong(Own):
    def levels(self, images):
        yield self.only(images)[:, :-1]


class Bare(torch.nn.Module):
    """Logits and features, without levels."""

    def __init__(self, width, classes, seed):
        super().__init__()
        self.only, self.classifier = torch.nn.Linear(3, 16), torch.nn.Linear(16, classes)

    def forward(self, images):
        features_BD = self.only(images.mean((2, 3)))
        return self.classifier(features_BD), features_BD


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(MODELS, "entries", dict(MODELS.entries))
    return lambda build: register_model("own", build)


def test_a_model_of_ones_own_is_one_call(small_context, register):
    register(Own)
    context = small_context(model__name="own", federation__method="fedrcl")
    assert context.model.classifier.in_features == 6
    assert context.layout.size == flat_layout(Own(2, 3)).size
    _, lines = run_rounds(context, 1)
    assert lines[0]["terms"]["supervised_contrast"] > 0
    register_model("bare", Bare)
    run_rounds(small_context(model__name="bare", federation__method="fedavg"), 1)


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        (Wrong, "fedavg", "forward on two images raised RuntimeError: .* must return logits"),
        (Bare, "fedrcl", "forward_with_levels on two images raised AttributeError"),
        (lambda w, c, seed: ResNet10(w, c + 1), "fedavg", r"shapes \[\[2, 4\], \[2, 16\]\]"),
        (
            lambda w, c, seed: torch.nn.Flatten(),
            "fedavg",
            r"returned shapes \[\[3072\], \[3072\]\]",
        ),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused(
    small_context, register, build, method, message
):
    register(build)
    with pytest.raises(UserError, match=message):
        small_context(model__name="own", federation__method=method)
