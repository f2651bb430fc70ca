"""What ``crishim check`` looks at: every requirement of the host as a value. Nothing is changed."""
