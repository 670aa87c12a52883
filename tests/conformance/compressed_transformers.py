"""Kinds of cases of "Compressed Transformers"."""

from tests.conformance import compressed_data, compressed_decoding, compressed_models, compressed_training

HANDLERS = {
    **compressed_models.HANDLERS,
    **compressed_data.HANDLERS,
    **compressed_training.HANDLERS,
    **compressed_decoding.HANDLERS,
}
