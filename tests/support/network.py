"""A machine that is alone: every attempt to leave it fails and is written down, in processes that are started, too."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG = "EMO_TEST_NETWORK_LOG"
"""Variable that names the file of attempts."""
HERE = ("", None, "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname())
SITE = f"""\
import importlib.util
spec = importlib.util.spec_from_file_location("network", {__file__!r})
network = importlib.util.module_from_spec(spec)
spec.loader.exec_module(network)
network.close()
"""
"""What a Python runs when it starts, found as sitecustomize.py on its path."""


class LeftTheMachine(OSError):
    """An address that is not this machine's was asked for."""


def close() -> dict[str, Any]:
    """Close the network in this process; returns what was there before, by name."""

    def guarded(real: Callable[..., Any], host: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            name = host(*arguments, **options)
            if (name.decode() if isinstance(name, bytes) else name) not in HERE:
                with Path(os.environ[LOG]).open("a") as log:
                    log.write(f"{name}\n")
                raise LeftTheMachine(f"{name} is not this machine")
            return real(*arguments, **options)

        return call

    def address(sock: socket.socket, where: Any) -> Any:
        return where[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else ""

    before = {"getaddrinfo": socket.getaddrinfo}
    socket.getaddrinfo = guarded(socket.getaddrinfo, lambda host, *rest, **more: host)
    for name in ("connect", "connect_ex"):
        before[name] = getattr(socket.socket, name)
        setattr(socket.socket, name, guarded(before[name], address))
    return before


@contextmanager
def closed(log: Path) -> Iterator[Callable[[], list[str]]]:
    """Close the network here and in processes that are started; gives what lists the attempts so far."""
    site = log.with_suffix(".site")
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    # a user's own setting keeps nothing open
    ours = {LOG: str(log), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ours |= {"HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
    variables = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    before = close()
    try:
        yield lambda: log.read_text().split() if log.exists() else []
    finally:
        socket.getaddrinfo = before.pop("getaddrinfo")
        for name, method in before.items():
            setattr(socket.socket, name, method)
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
