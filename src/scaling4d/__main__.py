"""`python -m scaling4d`, which dvc.yaml uses so that an experiment runs its own copy of the code, and `scaling4d`."""

import sys


def main() -> None:
    """As cli.main; a light installation without the commands' packages is told so in one line, with exit code 1."""
    try:
        from scaling4d.cli import main as commands
    except ModuleNotFoundError as error:
        if (error.name or "scaling4d").startswith("scaling4d"):
            raise
        extras = "pip install '.[pipeline]', or '.[commands]' for features and export"
        sys.exit(f"error: no package {error.name}; the commands need: {extras}")
    commands()


if __name__ == "__main__":
    main()
