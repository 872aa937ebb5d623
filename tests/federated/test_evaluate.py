"""Accuracies against models whose answers are known."""

from dataclasses import replace

import pytest
import torch

from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data.partition import make_partition
from semanticfl_ref.federated.evaluate import confusion, evaluate


class AlwaysFirst(torch.nn.Module):
    """Predicts class 0 for every image."""

    def forward(self, images):
        logits = torch.zeros(len(images), 3)
        logits[:, 0] = 1
        return logits, logits


def test_a_client_is_judged_by_its_own_label_distribution(small_context):
    context = small_context()
    line = evaluate(AlwaysFirst(), context)
    histogram_MC = torch.tensor(context.partition.histograms, dtype=torch.float64)
    client_M = torch.tensor(line["client_accuracy"], dtype=torch.float64)
    assert line["test_accuracy"] == 4 / 12
    assert client_M.allclose(histogram_MC[:, 0] / histogram_MC.sum(1))
    assert "own_accuracy" not in line
    assert line["validation_accuracy"] is None
    assert line["class_accuracy"] == [1.0, 0.0, 0.0]
    assert confusion(AlwaysFirst(), context) == [[4, 0, 0]] * 3


class ByBrightness(torch.nn.Module):
    """Predicts class 0 for dark images, 1 for grey and 2 for bright ones."""

    def forward(self, images):
        level_B = images.mean((1, 2, 3))
        logits = -(level_B[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()
        return logits, logits


def test_classes_and_their_confusion_on_numbers(small_context):
    """Seven test images of classes 0 and 1, none of class 2, which a client may hold alone."""
    context = small_context()
    bytes_N = torch.tensor([0, 0, 128, 255, 128, 128, 0])
    labels_N = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    images = bytes_N.to(torch.uint8)[:, None, None, None].expand(7, 32, 32, 3)
    partition = replace(context.partition, histograms=((3, 1, 0), (0, 2, 8), (0, 0, 5)))
    dataset = replace(context.dataset, test_images=images, test_labels=labels_N)
    context = replace(context, dataset=dataset, partition=partition)
    assert confusion(ByBrightness(), context) == [[2, 1, 1], [1, 2, 0], [0, 0, 0]]
    line = evaluate(ByBrightness(), context)
    assert line["class_accuracy"] == [2 / 4, 2 / 3, None]
    assert line["test_accuracy"] == 4 / 7
    assert line["macro_f1"] == pytest.approx((2 * 2 / (4 + 3) + 2 * 2 / (3 + 3)) / 2)
    logits_NC = ByBrightness()(images.permute(0, 3, 1, 2) / 127.5 - 1)[0]
    loss = logits_NC.logsumexp(1).mean() - logits_NC[torch.arange(7), labels_N].mean()
    assert line["test_loss"] == pytest.approx(loss.item())
    torch.testing.assert_close(line["client_accuracy"], [(3 * 2 / 4 + 2 / 3) / 4, 2 / 3, 0.0])


def test_a_client_is_judged_by_its_own_test_images(small_context):
    context = small_context()
    labels = context.dataset.train_labels
    settings = PartitionSettings(scenario="iid", clients=3, held_out_share=0.3)
    partition = make_partition(labels, settings, classes=3, seed=0)
    partition = replace(partition, held_out=(*partition.held_out[:2], partition.held_out[2][:0]))
    line = evaluate(AlwaysFirst(), replace(context, partition=partition))
    expected = [(labels[own] == 0).double().mean().item() for own in partition.held_out[:2]]
    assert line["own_accuracy"] == [*expected, None], "without test images there is no accuracy"
