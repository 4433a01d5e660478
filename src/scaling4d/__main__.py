"""`python -m scaling4d`, which dvc.yaml uses so that an experiment runs its own copy of the code, and `scaling4d`."""

import sys


def main() -> None:
    """As cli.main. One line names a package that a command lacks in a light installation, with exit code 1."""
    try:
        from scaling4d.cli import main as commands

        commands()
    except ModuleNotFoundError as error:
        if (error.name or "scaling4d").startswith("scaling4d"):
            raise
        extras = "pip install '.[pipeline]', or '.[commands]' for features and export"
        sys.exit(f"error: no package {error.name.partition('.')[0]}; the commands need: {extras}")


if __name__ == "__main__":
    main()
