"""Containers: lifecycle, exec, logs."""
