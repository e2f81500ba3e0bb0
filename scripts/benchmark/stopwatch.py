"""Run one command, and print as JSON what it took: seconds, seconds of CPU, peak memory in bytes, and its exit code.

Usage: python -I -S stopwatch.py FILE_FOR_STDERR COMMAND...

It is a process of its own because it is small. Linux never reports less peak memory for a child than its parent had
when it started it: from a large process, everything would look large.
"""

import json
import os
import sys
import time


def main() -> None:
    errors, *command = sys.argv[1:]
    actions = [
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
    ]
    start = time.monotonic()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    result = {
        "wall": time.monotonic() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "code": os.waitstatus_to_exitcode(status),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
