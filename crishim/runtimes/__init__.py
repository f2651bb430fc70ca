"""OCI runtimes (runc, crun) under conmon."""
