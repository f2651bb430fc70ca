"""Images: references, registries, pulls, the image index."""
