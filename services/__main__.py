"""Lets ``python -m services`` be the ``tripfold`` command, wherever its script is."""

from services.cli import main

main()
