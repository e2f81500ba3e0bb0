"""The program `lora-cli`, also as `python -m lora_cli`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point of the console script."""
    # The libraries take most of a second. Nothing is under way then, and an interrupt is no reason for a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    try:
        from lora_cli.cli import app

        app.main()
    except MemoryError:
        # Not even what shows errors could be loaded or run. What was being written is gone by now.
        os.write(2, b"error: The system gave this process no more memory\n")
        os._exit(70)


if __name__ == "__main__":
    main()
