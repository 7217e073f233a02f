"""Measurements of posada beside its peers, taken in one run. Start with ``make bench``."""
