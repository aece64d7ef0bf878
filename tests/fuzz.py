"""`make fuzz`: test_fuzz.py with many examples, once for each width of vectors that the CPU kernel has on this machine.

    python tests/fuzz.py [--examples 2000] [--seed N]

A failure prints the smallest problem found and the seed that finds it again.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

from common import CAPABILITIES, best_capability

TESTS = Path(__file__).parent


def main() -> int:
    """Run the widths one after another; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="for each width")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    status = 0
    for width in reversed(CAPABILITIES[: CAPABILITIES.index(best_capability()) + 1]):
        print(f"fuzz: {given.examples} examples, seed {given.seed}, LOMIX_FAST_CPU_CAPABILITY={width}", flush=True)
        variables = {
            "LOMIX_FAST_CPU_CAPABILITY": width,
            "FUZZ_EXAMPLES": str(given.examples),
            "FUZZ_BACKENDS": "" if width == best_capability() else "cpu",  # for the others it makes no difference
            "HYPOTHESIS_PROFILE": "explore",
        }
        options = ["-q", "--timeout=0", "-p", "no:cacheprovider", f"--hypothesis-seed={given.seed}"]
        command = [sys.executable, "-m", "pytest", *options, str(TESTS / "test_fuzz.py")]
        status |= subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
