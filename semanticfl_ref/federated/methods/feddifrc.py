"""FedDifRC: features agree with the image's diffusion features, and contrast with the text-driven
diffusion features of every class.

    L = CE + lambda_noise KL( softmax(noise-driven anchor) || softmax(feature) )
           + lambda_text InfoNCE(feature, text-driven anchors; own class, tau)

Source: Wang, Li, Chen, Yan, Shi, Shen: FedDifRC: Unlocking the Potential of Text-to-Image Diffusion
Models in Heterogeneous Federated Learning. ICCV 2025, arXiv 2507.06482, and its public code: unit
vectors in both terms, all weights 1, tau = 0.04. Its text-driven keys are U-Net features
conditioned on the class's prompt; `anchors.text` says what the keys are here. Defects of that code
are not copied: images scaled twice, the third level built from the second's tensor, PCA fitted to
each batch, one InfoNCE sum that pairs a feature with other images' keys.

Both weights 0 is FedAvg. The KL divergence has no temperature, and between unit vectors of 512
entries (0.002 nats) its gradient is negligible. A linear head maps features to anchors
where their widths differ, and none where they are equal, as in the paper.

Letters: B batch, C classes, D feature width.
"""

from semanticfl_ref.config.settings import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.losses import consistency, contrast
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Payload, Terms


def heads_where_widths_differ(config: Config, anchors: Anchors, features: int) -> dict[str, int]:
    """Heads towards the anchors' spaces."""
    widths = {"visual_width": anchors.visual.shape[1], "text_width": anchors.text.shape[1]}
    return {name: width for name, width in widths.items() if width != features}


def diffusion_terms(batch: LocalBatch) -> Terms:
    """Two terms; one of weight zero, or whose anchors the client lacks, is not computed.

    Equation (feddifrc) [FedDifRC]:
        lambda_noise * KL( softmax(noise-driven anchor) || softmax(f) )
        + lambda_text * InfoNCE(f, text-driven anchors; own class, tau)
    Test: tests/tools/trace/test_trace.py::test_the_weighted_terms_sum_to_the_loss
    """
    s, model, terms = batch.settings, batch.model, {}
    if s.lambda_noise > 0 and batch.visual_BD is not None:
        mapped_BD = model.visual_head(batch.features_BD)
        value = consistency(mapped_BD, batch.visual_BD, "kl-unit", s.temperature)
        terms["noise_consistency"] = (s.lambda_noise, value)
    if s.lambda_text > 0 and batch.text_CD is not None:
        mapped_BD = model.text_head(batch.features_BD)
        value = contrast(mapped_BD, batch.text_CD, batch.labels_B, s.tau)
        terms["text_contrast"] = (s.lambda_text, value)
    return terms


def anchors_of_active_terms(config: Config) -> Payload:
    """A term of weight zero needs no anchors."""
    return Payload(visual=config.method.lambda_noise > 0, text=config.method.lambda_text > 0)


FEDDIFRC = Method(
    local_terms=diffusion_terms,
    heads=heads_where_widths_differ,
    payload=anchors_of_active_terms,
    needs_anchors=True,
)
