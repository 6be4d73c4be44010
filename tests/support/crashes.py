"""Runs a function in a forked process that is killed, or stopped from writing, at a chosen moment."""

import os
import resource
import signal
import time

OPERATIONS = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "unlink")


def _in_child(function):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(function() or 0)
        finally:
            os._exit(code)  # without pytest's own endings
    return child


def killed_after(seconds, function):
    """Kill the process after that time; `True` if it had ended before."""
    child = _in_child(function)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return not os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed_at(operation, function):
    """Kill the process before it changes the file system for the `operation`th time; `True` if it ended before."""

    def counted():
        left = [operation]

        def counting(original):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for name in OPERATIONS:
            setattr(os, name, counting(getattr(os, name)))
        function()

    return not os.WIFSIGNALED(os.waitpid(_in_child(counted), 0)[1])


def fails_with_files_limited_to(size, function):
    """Whether the function raises an error where no file can grow beyond `size` bytes, as on a full disk."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            function()
        except Exception:  # what a full disk raises differs by who writes
            return 3
        return 0

    code = os.waitstatus_to_exitcode(os.waitpid(_in_child(limited), 0)[1])
    assert code in (0, 3)
    return code == 3
