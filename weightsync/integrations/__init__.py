"""Training frameworks whose weights weightsync can push: what each needs is in docs/integrations.md.

Each module imports its framework, and nothing else of weightsync imports any of them.
"""
