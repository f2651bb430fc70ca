"""What ``crishim demo`` shows: an image made on the spot, a registry for it, a daemon of its own, and a pod."""
