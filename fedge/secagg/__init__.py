"""Secure aggregation: words in a ring, masked in pairs, summed by whole blocs, audited for leverage.

This package knows bytes, words and prekeys. What the words mean is `fedge.update`'s business.
"""
