"""The only place that starts processes, calls libc, mounts and sets namespaces."""
