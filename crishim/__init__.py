"""crishim: a container runtime daemon for a Kubernetes node."""

__version__ = "0.1.0"
