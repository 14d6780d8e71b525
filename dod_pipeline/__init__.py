"""Orchestration of `dod_models`: DVC versions, `dod` resolves configs and paths, nothing here computes."""
