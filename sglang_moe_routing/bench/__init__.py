"""Measuring a running server: start one, load it, check what it recorded."""
