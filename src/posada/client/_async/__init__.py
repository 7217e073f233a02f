"""The async API, written by hand; ``_sync`` beside it is generated from it."""
