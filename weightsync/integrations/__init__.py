"""Integrations with training frameworks; docs/integrations.md says what each needs.

Each module imports its framework. No other part of weightsync imports these modules.
"""
