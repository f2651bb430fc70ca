"""Logs, metrics and the steps of each operation."""
