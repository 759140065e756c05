"""The package version: read by setup.py as text, so this file imports nothing."""

__version__ = "0.1.0"
