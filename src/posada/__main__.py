"""``python -m posada``: the command line."""

from posada.cli.main import main

main()
