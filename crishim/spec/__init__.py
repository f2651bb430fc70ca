"""The OCI runtime spec as typed values and the pure functions that make it."""
