"""What the tests that need root work with: a daemon, registries, images, a client and a check for leaks."""
