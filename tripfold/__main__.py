"""Lets ``python -m tripfold`` be the ``tripfold`` command, wherever its script is."""

from tripfold.cli import main

main()
