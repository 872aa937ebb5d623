"""FedDifRC: features agree with the image's diffusion features, and contrast with every class's
text-driven diffusion features.

    L = CE + lambda_noise KL( softmax(noise-driven anchor) || softmax(feature) ) + lambda_text
    InfoNCE(feature, text-driven anchors; own class, tau)

Source: Wang, Li, Chen, Yan, Shi, Shen: FedDifRC: Unlocking the Potential of Text-to-Image Diffusion
    Models in Heterogeneous Federated Learning. ICCV
2025, arXiv 2507.06482, and its public code: unit vectors in both terms, all weights 1, tau = 0.04.
Its text-driven keys are U-Net features conditioned on the class's prompt: `anchors.text` says what
the keys are here. Defects of that code are not copied (images scaled twice, the third level built
from the second's tensor, PCA fitted to each batch, one InfoNCE sum that pairs a feature with other
images' keys).

Both weights 0 is FedAvg. The published KL has no temperature and is next to inert on unit vectors
of 512 entries (0.002 nats). A linear head stands between features and anchors where their widths
differ, and none where they agree, as in the paper."""

from semanticfl_ref.config import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.losses import consistency, contrast
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Terms


def heads_where_widths_differ(config: Config, anchors: Anchors, features: int) -> dict[str, int]:
    """Heads towards the anchors' spaces."""
    widths = {"visual_width": anchors.visual.shape[1], "text_width": anchors.text.shape[1]}
    return {name: width for name, width in widths.items() if width != features}


def diffusion_terms(batch: LocalBatch) -> Terms:
    """The two terms beside the cross-entropy. A term of weight zero, or whose anchors the client
    does not get, is not computed.

    Equation (feddifrc) [FedDifRC]: lambda_noise * KL( softmax(noise-driven anchor) || softmax(f) )
        + lambda_text * InfoNCE(f, text-driven anchors; own class, tau)
    Test: tests/study/test_trace.py::test_the_weighted_terms_sum_to_the_loss
    """
    o, model, terms = batch.config.feddifrc, batch.model, {}
    if o.lambda_noise > 0 and batch.visual_BD is not None:
        seen_BD = (
            batch.features_BD if model.visual_head is None else model.visual_head(batch.features_BD)
        )
        terms["noise_consistency"] = (
            o.lambda_noise,
            consistency(seen_BD, batch.visual_BD, "kl-unit", o.temperature),
        )
    if o.lambda_text > 0 and batch.text_CD is not None:
        seen_BD = (
            batch.features_BD if model.text_head is None else model.text_head(batch.features_BD)
        )
        terms["text_contrast"] = (
            o.lambda_text,
            contrast(seen_BD, batch.text_CD, batch.labels_B, o.tau),
        )
    return terms


FEDDIFRC = Method(
    local_terms=diffusion_terms,
    heads=heads_where_widths_differ,
    needs_anchors=True,
    reads_anchors=lambda config: (
        config.feddifrc.lambda_noise > 0,
        config.feddifrc.lambda_text > 0,
    ),
)
