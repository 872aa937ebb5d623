"""The presets of `semanticfl`: at the first step every term moves the features."""

import pytest
import torch
import torch.nn.functional as F

from semanticfl_ref.config.registry import DATASETS
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.data.dataset import Dataset
from semanticfl_ref.data.partition import make_partition
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.context import make_context
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.run.summary import NEGLIGIBLE

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


@pytest.mark.parametrize("name", DATASETS)
def test_no_term_of_a_preset_is_inert(name):
    shares = first_shares(name)
    assert set(shares) == {"cross_entropy", "consistency", "contrast"}
    assert min(shares.values()) >= NEGLIGIBLE, shares
