"""``python -m headwise.runtime.cli``: the command ``headwise``."""

from headwise.runtime.cli.main import main

main()
