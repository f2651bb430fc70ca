"""The typed settings."""
