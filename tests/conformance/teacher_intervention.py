"""Kinds of cases of "Teacher Intervention"."""

from tests.conformance import intervention_analysis, intervention_models, intervention_quantizers

HANDLERS = {**intervention_quantizers.HANDLERS, **intervention_models.HANDLERS, **intervention_analysis.HANDLERS}
