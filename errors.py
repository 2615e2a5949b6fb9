"""How nanolong says no: one sentence that says what was wrong and what would be right, and exit code 2."""

import os
import sys


class Refused(ValueError):
    """Bad input. The message is one clear sentence for the person who typed it; nothing has been written."""


def main(run):
    """Run a script's main function; a `Refused` becomes its sentence on standard error and exit code 2."""
    try:
        sys.exit(run())
    except Refused as no:
        # of `python -m attention` that is attention/__main__.py
        script = sys.argv[0].removesuffix(f"{os.sep}__main__.py")
        print(f"{os.path.basename(script)}: {no}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output has left (| head): nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
