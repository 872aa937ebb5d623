"""FedDifRC: features agree with the image's diffusion features, and contrast with the text-driven
diffusion features of every class.

    L = CE + lambda_noise consistency(feature, noise-driven anchor)
           + lambda_text InfoNCE(feature, text-driven keys; own class, tau)

Source: Wang, Li, Chen, Yan, Shi, Shen: FedDifRC: Unlocking the Potential of Text-to-Image Diffusion
Models in Heterogeneous Federated Learning. ICCV 2025, arXiv 2507.06482, as notes on it give it, and
its public code: unit vectors in both terms, all weights 1, tau = 0.04, t = 300 in the paper's
figure (999 in the code). The consistency is an L2 loss in the paper and the KL divergence of
softmaxes without temperature in the code. Text-driven keys are the same image's U-Net features
under every class's prompt; the own class's is the positive.

Choice: the L2 loss is the squared distance of unit vectors, summed over entries; a mean over 512
entries would make it negligible. feddifrc.keys = class-mean has one key per class instead, the mean
over some images under their own class's prompt, which needs far fewer passes. Anchors and keys are
norms over positions of the components of a PCA at every position, as in the code
(diffusion.pooling = norm); the PCA is fitted once, to 128 of the images under the empty prompt.
With the embedded model they are means over positions, with a PCA after them.

Defects of that code are not copied: images scaled twice, the third level built from the second's
tensor, PCA fitted to each batch, one InfoNCE sum that pairs a feature with other images' keys.

Both weights 0 is FedAvg. The code's KL divergence between unit vectors of 512 entries (0.002 nats)
has a negligible gradient. A linear head maps features to anchors where their widths differ, and
none where they are equal, as in the paper.

Letters: B batch, C classes, D feature width.
"""

from semanticfl_ref.config.settings import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.losses import consistency, contrast
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Payload, Terms


def heads_where_widths_differ(config: Config, anchors: Anchors, features: int) -> dict[str, int]:
    """Heads towards the anchors' spaces."""
    widths = {"visual_width": anchors.visual.shape[1], "text_width": anchors.text.shape[-1]}
    return {name: width for name, width in widths.items() if width != features}


def diffusion_terms(batch: LocalBatch) -> Terms:
    """Two terms; one of weight zero, or whose anchors the client lacks, is not computed.

    Equation (feddifrc) [FedDifRC; l2: its paper, kl: its code]:
        lambda_noise * consistency(f, noise-driven anchor)
        + lambda_text * InfoNCE(f, text-driven keys; own class, tau),
        consistency = |f / |f| - a / |a||^2  or  KL( softmax(a / |a|) || softmax(f / |f|) )
    Test: tests/federated/test_feddifrc.py::test_both_terms_on_numbers
    """
    s, model, terms = batch.settings, batch.model, {}
    if s.lambda_noise > 0 and batch.visual_BD is not None:
        mapped_BD = model.visual_head(batch.features_BD)
        if s.consistency == "l2":  # |f / |f| - a / |a||^2 = 2 (1 - cos)
            value = 2 * consistency(mapped_BD, batch.visual_BD, "cosine")
        else:
            value = consistency(mapped_BD, batch.visual_BD, "kl-unit", s.temperature)
        terms["noise_consistency"] = (s.lambda_noise, value)
    if s.lambda_text > 0 and batch.text_CD is not None:
        mapped_BD = model.text_head(batch.features_BD)
        value = contrast(mapped_BD, batch.text_CD, batch.labels_B, s.tau)
        terms["text_contrast"] = (s.lambda_text, value)
    return terms


def keys_per_image(config: Config) -> bool:
    """Whether the contrast's keys are those of each image.

    Raises:
        UserError: they would be of other images than the clients', or not from the U-Net.
    """
    if config.method.keys == "class-mean" or config.method.lambda_text == 0:
        return False
    for name, needed in (("text", "unet"), ("images", "train")):
        if getattr(config.anchors, name) != needed:
            raise UserError(
                f"feddifrc.keys = per-image needs anchors.{name} = {needed}, since keys are U-Net "
                f"features of the clients' own images: set it, or feddifrc.keys=class-mean"
            )
    return True


def anchors_of_active_terms(config: Config) -> Payload:
    """A term of weight zero needs no anchors."""
    return Payload(visual=config.method.lambda_noise > 0, text=config.method.lambda_text > 0)


FEDDIFRC = Method(
    local_terms=diffusion_terms,
    heads=heads_where_widths_differ,
    payload=anchors_of_active_terms,
    needs_anchors=True,
    texts_per_image=keys_per_image,
)
