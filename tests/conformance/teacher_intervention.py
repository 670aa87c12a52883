"""Kinds of cases of "Teacher Intervention"."""

from tests.conformance import intervention_models, intervention_quantizers

HANDLERS = {**intervention_quantizers.HANDLERS, **intervention_models.HANDLERS}
