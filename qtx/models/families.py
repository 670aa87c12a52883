"""Which model families exist. Each describes itself, as `FAMILY`, in a file of its own."""

from __future__ import annotations

from qtx.errors import UserError
from qtx.models import albert, bert, distilbert, encoder_decoder, mobilebert, roberta, squeezebert, text_classifier
from qtx.models.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (bert, roberta, distilbert, albert, mobilebert, squeezebert, text_classifier, encoder_decoder)
}


def get_family(model_type: str) -> Family:
    """Returns a family by its Hugging Face `model_type`, or raises a `UserError` that lists what there is."""
    if model_type not in FAMILIES:
        # All of them, not the nearest: another family is another model, not a slip of the pen.
        raise UserError(f"model family {model_type!r} is not supported; choose from: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
