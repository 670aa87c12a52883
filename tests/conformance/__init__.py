"""Handlers of the conformance runner, one module per published project.

Each module has `HANDLERS`: kind of case -> function of a `Case`.
"""
