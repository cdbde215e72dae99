"""Exports: guards and low precision."""
