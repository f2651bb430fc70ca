"""The values that the CRI and this daemon speak of, free of any protocol or I/O."""
