"""Runs critest, the CRI's own conformance suite, with images, registry and daemon made for it: ``hack/conformance``."""
