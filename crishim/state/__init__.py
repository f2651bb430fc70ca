"""What the daemon knows, in one SQLite database."""
