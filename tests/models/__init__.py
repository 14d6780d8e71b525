"""Unit tests of dod_models, one file for each module."""
