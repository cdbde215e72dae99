"""Frozen backbones, and the cache of what they give."""
