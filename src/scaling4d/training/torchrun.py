"""torchrun whose ranks have time to save: `python -m scaling4d.training.torchrun WAIT_S ARGUMENTS`.

Ranks that torchrun asks to end are killed WAIT_S seconds later. It is torchrun's option --shutdown-timeout, which torch
2.10, that of requirements-cuda.lock, lacks: it kills them after 30 s.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import PContext


def main() -> None:
    wait_s, *arguments = sys.argv[1:]
    close = PContext.close

    def close_later(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 0) -> None:
        close(self, death_sig, int(wait_s))

    PContext.close = close_later
    run.main(arguments)


if __name__ == "__main__":
    main()
