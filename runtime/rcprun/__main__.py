"""`python -m rcprun` is `rcp-run`."""

from rcprun.cli import main

main(prog_name="rcp-run")
