"""Recorded presence, links and heat, and the models that were fitted to them."""
