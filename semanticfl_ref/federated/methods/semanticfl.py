"""SemanticFL: features are drawn to their images' diffusion anchors and to their class's text
anchor.

    L = CE + lambda_kd * consistency(features, visual anchors) + lambda_con * InfoNCE(features, text
    anchors; own class, tau)

Source: arXiv 2603.19337 (objective and weights as summarised second-hand; what is not published is
    an option, see method_settings.py).

With both weights zero this is FedAvg. The paper's ablation: lambda_kd = 0 is without visual
anchors, lambda_con = 0 without text anchors; the VAE's latents alone or the U-Net alone are
settings of `diffusion.taps`. The literal KL between unit vectors at temperature 1 does next to
nothing."""

from semanticfl_ref.config import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.losses import consistency, contrast
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Terms


def anchor_heads(config: Config, anchors: Anchors, features: int) -> dict[str, int]:
    """A head towards each anchor's space; the visual one can be left out where the widths agree."""
    if not config.semantic.visual_head and anchors.visual.shape[1] != features:
        raise UserError(
            f"semantic.visual_head = false needs anchors as wide as the features: anchors.width is {anchors.visual.shape[1]}, features have {features}"
        )
    return {
        "visual_width": anchors.visual.shape[1] if config.semantic.visual_head else 0,
        "text_width": anchors.text.shape[1],
    }


def semantic_terms(batch: LocalBatch) -> Terms:
    """The two terms beside the cross-entropy. A term of weight zero, or whose anchors the client
    does not get, is not computed.

    Equation (semanticfl) [S]: lambda_kd * consistency(visual head(f), visual anchors) + lambda_con
        * InfoNCE(text head(f), text anchors; own class, tau)
    Test: tests/federated/test_round.py::test_each_term_alone_changes_the_result_and_is_reported
    """
    o, terms = batch.config.semantic, {}
    if o.lambda_kd > 0 and batch.visual_BD is not None:
        seen_BD = (
            batch.features_BD
            if batch.model.visual_head is None
            else batch.model.visual_head(batch.features_BD)
        )
        terms["consistency"] = (
            o.lambda_kd,
            consistency(seen_BD, batch.visual_BD, o.consistency, o.kd_temperature, o.kd_squared),
        )
    if o.lambda_con > 0 and batch.text_CD is not None:
        terms["contrast"] = (
            o.lambda_con,
            contrast(
                batch.model.text_head(batch.features_BD), batch.text_CD, batch.labels_B, o.tau
            ),
        )
    return terms


SEMANTICFL = Method(
    local_terms=semantic_terms,
    heads=anchor_heads,
    needs_anchors=True,
    reads_anchors=lambda config: (config.semantic.lambda_kd > 0, config.semantic.lambda_con > 0),
)
