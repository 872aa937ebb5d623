"""The presets of `semanticfl`: at the first step every term moves the features."""

import pytest
import torch
import torch.nn.functional as F

from semanticfl_ref.config.registry import DATASETS
from semanticfl_ref.config.resolve import read_toml, resolve
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.data.partition import make_partition
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.context import make_context
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.run.summary import NEGLIGIBLE, negligible_terms
from semanticfl_ref.tools import reproduce

CLASSES = {"cifar100": 100, "tinyimagenet": 200}
TEXT_WIDTH = {"stable": 768, "tiny": 64}


def first_shares(name: str, **settings: object) -> dict[str, float]:
    """Share of the gradient norm at the features of each term, in one client's first batch.

    Images are noise with a colour per class. Anchors have the statistics of real ones: whitened or
    raw PCA components (spectrum 1/k), around a mean per class; text anchors are unit vectors with a
    common part, as CLIP's are.
    """
    classes = CLASSES.get(name, 10)
    base = {"data.name": name, "federation.method": "semanticfl", **settings}
    fixed = {"partition.clients": 1, "federation.clients_per_round": 1}
    fixed |= {"federation.local_epochs": 1, "partition.scenario": "iid", "run.precision": "fp32"}
    config = resolve(base | fixed)
    source = torch.Generator().manual_seed(0)
    count = config.federation.batch_size
    labels = torch.randint(0, classes, (count,), generator=source)
    colours = torch.randint(0, 160, (classes, 1, 1, 3), generator=source)
    noise = torch.randint(0, 96, (count, 32, 32, 3), generator=source)
    images = (colours[labels] + noise).to(torch.uint8)
    dataset = Dataset(
        name=name,
        class_names=tuple(map(str, range(classes))),
        train_images=images,
        train_labels=labels,
        validation_images=images[:0],
        validation_labels=labels[:0],
        test_images=images[:1],
        test_labels=labels[:1],
        sha256="0" * 64,
    )
    width = config.anchors.width
    visual = torch.randn(count, width, generator=source)
    visual += torch.randn(classes, width, generator=source)[labels]
    if not config.anchors.whiten:
        visual /= torch.arange(1, width + 1)
    text_width = TEXT_WIDTH["tiny" if config.diffusion.source == "tiny" else "stable"]
    text = torch.randn(classes, text_width, generator=source)
    text = F.normalize(text + 2 * torch.randn(text_width, generator=source), dim=1)
    anchors = Anchors(visual=visual, text=text, per="image", provenance={})
    partition = make_partition(labels, config.partition, classes=classes, seed=0)
    context = make_context(config, dataset, partition, anchors)
    start_P = initial_state(context).params
    update = LocalUpdate(context=context, client=0, round=1, start_P=start_P, method_state={})
    (report,) = context.replicas.train([update])
    return {term: gradient.share for term, gradient in report.first.gradients.items()}


TINY = {"diffusion.source": "tiny"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in DATASETS), ("image_folder", TINY), ("cifar10", TINY)],
)
def test_no_term_of_a_preset_is_inert(name, settings):
    shares = first_shares(name, **settings)
    assert set(shares) == {"cross_entropy", "consistency", "contrast"}
    assert min(shares.values()) >= NEGLIGIBLE, shares


@pytest.mark.parametrize(
    ("settings", "inert"),
    [
        ({"semanticfl.kd_squared": True}, "consistency"),
        ({"semanticfl.kd_temperature": 1.0}, "consistency"),
        ({"semanticfl.lambda_con": 0.01}, "contrast"),
        (read_toml(reproduce.FOLDER / "cifar10-nid1.toml"), "contrast"),
        (read_toml(reproduce.FOLDER / "cifar100-nid2.toml"), "contrast"),
    ],
)
def test_a_reading_that_is_inert_has_to_be_named_and_is_warned_of(settings, inert):
    """Those of the summary, which nothing but a setting or a published cell chooses."""
    settings = dict(settings)
    name = settings.pop("data.name", "cifar10")
    (warning,) = negligible_terms(first_shares(name, **settings))
    assert f"the term {inert!r} contributes 0." in warning


def test_the_measured_shares():
    """The ones that docs/choices.md names, in per cent of the gradient norm at the features."""
    readings = {
        0.03: {"semanticfl.kd_squared": True},
        2.7: {},
        11: {"semanticfl.consistency": "cosine"},
    }
    for percent, settings in readings.items():
        share = 100 * first_shares("cifar10", **settings)["consistency"]
        assert share == pytest.approx(percent, rel=0.1)
