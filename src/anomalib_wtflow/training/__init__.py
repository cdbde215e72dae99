"""Callbacks and helpers of a fit."""
