"""The program in the place of `python` (see preloaded.py): asks for a process, forwards signals to it, ends as it does.

ask_preloaded.py SOCKET PYTHON WORDS...        imports as little as it can: it runs at each start
"""

import array
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def ask(address, python, *words):
    """The exit code of a process forked for these words; where none can be, become an ordinary Python."""
    order = {"words": words, "environment": dict(os.environ), "asks": os.getpid(), "parent": os.getppid()}
    order["folder"] = os.getcwd()  # noqa: PTH109
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        server.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))])
        server.sendall(json.dumps(order).encode() + b"\n")
        answers = server.makefile("rb")
        if (process := int(answers.readline())) == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            os.execv(python, [python, *words])
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(process, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    os._exit(ask(*sys.argv[1:]))
