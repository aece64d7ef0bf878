"""`python -m lomix_fast COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .demo import cli as demo
from .doctor import cli as doctor

# A command is a module with HELP, add_arguments(parser) and run(arguments) -> exit status that imports nothing
# heavy at its top.
COMMANDS = {"demo": demo, "doctor": doctor}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command it names.

    Args:
        arguments: words after the program's name; None takes those of this process.

    Returns:
        Exit status of the command. A command line that does not parse raises SystemExit, as argparse does.
    """
    parser = argparse.ArgumentParser(prog="python -m lomix_fast", description="The LoMix loss, fused.")
    parser.add_argument("--version", action="version", version=f"lomix_fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(subparsers.add_parser(name, help=module.HELP, description=module.HELP))
    given = parser.parse_args(arguments)
    return COMMANDS[given.command].run(given)


if __name__ == "__main__":
    sys.exit(main())
