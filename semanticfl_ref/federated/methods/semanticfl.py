"""SemanticFL: features agree with their images' diffusion anchors, and contrast with the text
anchors of the classes.

    L = CE + lambda_kd * consistency(features, visual anchors)
           + lambda_con * InfoNCE(features, text anchors; own class, tau)

Source: arXiv 2603.19337 (objective and weights as summarised second-hand; what is not published is
an option, see config/methods.py and docs/choices.md).

Both weights 0 is FedAvg, or FedProx with mu above 0. The literal KL divergence between unit vectors
at temperature 1 has a negligible gradient.

Letters: B batch, C classes, D feature width.
"""

from semanticfl_ref.config.settings import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.losses import consistency, contrast
from semanticfl_ref.federated.methods.fedprox import proximal_term
from semanticfl_ref.federated.methods.method import LocalBatch, Method, Payload, Terms


def anchor_heads(config: Config, anchors: Anchors, features: int) -> dict[str, int]:
    """A head towards each anchor's space; the visual one is optional if the widths are equal."""
    width, head = anchors.visual.shape[1], config.method.visual_head
    if not head and width != features:
        raise UserError(
            f"semanticfl.visual_head = false needs anchors as wide as the features: anchors.width "
            f"is {width}, features have {features}"
        )
    return {"visual_width": width if head else 0, "text_width": anchors.text.shape[1]}


def semantic_terms(batch: LocalBatch) -> Terms:
    """The terms, and FedProx's; one of weight zero, or whose anchors the client lacks, is left out.

    Equation (semanticfl) [S]:
        lambda_kd * consistency(visual head(f), visual anchors)
        + lambda_con * InfoNCE(text head(f), text anchors; own class, tau)
    Test: tests/federated/test_round.py::test_each_term_alone_changes_the_result_and_is_reported
    """
    s, model, terms = batch.settings, batch.model, proximal_term(batch)
    if s.lambda_kd > 0 and batch.visual_BD is not None:
        mapped_BD = model.visual_head(batch.features_BD)
        value = consistency(
            mapped_BD, batch.visual_BD, s.consistency, s.kd_temperature, s.kd_squared
        )
        terms["consistency"] = (s.lambda_kd, value)
    if s.lambda_con > 0 and batch.text_CD is not None:
        mapped_BD = model.text_head(batch.features_BD)
        value = contrast(mapped_BD, batch.text_CD, batch.labels_B, s.tau)
        terms["contrast"] = (s.lambda_con, value)
    return terms


def anchors_of_active_terms(config: Config) -> Payload:
    """A term of weight zero needs no anchors."""
    return Payload(visual=config.method.lambda_kd > 0, text=config.method.lambda_con > 0)


SEMANTICFL = Method(
    local_terms=semantic_terms,
    heads=anchor_heads,
    payload=anchors_of_active_terms,
    needs_anchors=True,
)
