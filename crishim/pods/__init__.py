"""Sandboxes: lifecycle, namespaces, network."""
