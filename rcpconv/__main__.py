"""`python -m rcpconv` is the `rcpconv` command."""

import os
import sys

from rcpconv.cli import main


def run() -> None:
    """As the command; but one of several processes that trained together ends at once when it is done.

    Python's own way to end takes down threads of torch.distributed in an order that, now and then, aborts the process,
    and then torchrun calls the whole training failed (docs/log.md, 2026-11-29).
    """
    try:
        main(prog_name="python -m rcpconv")
    except SystemExit as end:
        if end.code in (0, None) and _one_of_several():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise


def _one_of_several() -> bool:
    """Whether torchrun started this process and it has done what it was started for."""
    if "torch.distributed" not in sys.modules:
        return False
    from rcpconv import distributed

    return distributed.launched()


if __name__ == "__main__":
    run()
