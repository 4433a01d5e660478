"""`python -m scaling4d`, which dvc.yaml uses so that an experiment runs its own copy of the code, and `scaling4d`."""

import signal
import sys


def main() -> None:
    """As cli.main, also for Ctrl-C before it. One line names a package that a command lacks, with exit code 1."""
    try:
        from scaling4d.cli import main as commands

        commands()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except ModuleNotFoundError as error:
        if (error.name or "scaling4d").startswith("scaling4d"):
            raise
        extras = "pip install 'scaling4d[pipeline]', or 'scaling4d[commands]' for features and export"
        sys.exit(f"error: no package {error.name.partition('.')[0]}; the commands need: {extras}")


if __name__ == "__main__":
    main()
