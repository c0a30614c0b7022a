"""Runs a shell script whose Python programs are forked from the tests' fork server, which has imported torch already.

The script is given a `PYTHON` that hands its arguments to this process; each program is then a fresh process that
starts in well under a second.
"""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import tests.gloo  # noqa: F401  sets what the fork server imports

CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    connection.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    code, output = json.loads(connection.makefile().readline())
sys.stdout.write(output)
sys.exit(code)
"""


def run_script(script: Path, arguments: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    """Run a script in a folder; returns its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as short:  # a socket's name is of at most 107 bytes
        return _run_script(script, arguments, folder, Path(short) / "socket", environment)


def _run_script(script: Path, arguments: list[str], folder: Path, place: Path,
                environment: dict[str, str]) -> tuple[int, str]:
    (folder / "client.py").write_text(CLIENT.format(path=str(place)))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -ISs {folder / "client.py"} "$@"\n')
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        threading.Thread(target=_serve, args=(listener, folder / "output"), daemon=True).start()
        done = subprocess.run(["bash", str(script), *arguments], cwd=folder, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=500, check=False,
                              env={"PATH": os.environ["PATH"], "PYTHON": str(python), **environment})
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
    return done.returncode, done.stdout


def _serve(listener: socket.socket, output: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the script has ended
            return
        with connection:
            process = context.Process(target=_run, args=(*json.loads(connection.makefile().readline()), str(output)))
            process.start()
            process.join()
            answer = [process.exitcode, output.read_text(errors="replace")]
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _run(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """What `python WORDS` does, in a process that has been forked for it."""
    with open(output, "wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = words
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")
