"""Which model families exist. Each describes itself in a file, as `FAMILY`."""

from __future__ import annotations

from qtx.errors import UserError
from qtx.models import albert, bert, distilbert, encoder_decoder, mobilebert, roberta, squeezebert, text_classifier, vit
from qtx.models.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        bert.FAMILY,
        roberta.FAMILY,
        distilbert.FAMILY,
        albert.FAMILY,
        mobilebert.FAMILY,
        squeezebert.FAMILY,
        vit.FAMILY,
        vit.DEIT,
        text_classifier.FAMILY,
        encoder_decoder.FAMILY,
    )
}


def get_family(model_type: str) -> Family:
    """Returns a family by its Hugging Face `model_type`, or raises a `UserError` that lists what there is."""
    if model_type not in FAMILIES:
        # All of them, not the nearest: another family is another model, not a slip of the pen.
        raise UserError(f"model family {model_type!r} is not supported; choose from: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
