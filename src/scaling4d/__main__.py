"""`python -m scaling4d`, which dvc.yaml uses so that an experiment runs its own copy of the code."""

from scaling4d.cli import main

main()
