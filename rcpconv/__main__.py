"""`python -m rcpconv` is the `rcpconv` command."""

from rcpconv.cli import main

if __name__ == "__main__":
    main(prog_name="python -m rcpconv")
