"""Tests that need root: real daemons, containers, networks and registries."""
