# Generated from _async/__init__.py by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.
"""The async API, written by hand; ``_sync`` beside it is generated from it."""
