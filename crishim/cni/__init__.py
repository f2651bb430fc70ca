"""Pod networks by CNI plugins."""
