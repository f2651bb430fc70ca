"""``python -m crishim``."""

from crishim.cli.main import main

main()
