"""Runs in the emulated machine: TVM's RPC server with the runtime alone, in one process, for tests of tuning on boards.

    python3.11 rpc_server.py KEY        prints "bind to HOST:PORT", and serves a session; it ends with that, or its input

TVM's own command forks, which an emulated process does not survive, and wants packages that the root folder does not hold.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading

from tvm.rpc import base, server
from tvm.support import utils


def main() -> None:
    """Listen on a port that is free."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    sys.stdout.write(f"bind to 127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    connection, _ = listener.accept()
    while not greeted(connection, sys.argv[1]):     # by who asks whether this is a tracker
        connection.close()
        connection, _ = listener.accept()
    server._serve_loop(connection, None, utils.tempdir())


def greeted(connection: socket.socket, key: str) -> bool:
    """TVM's greeting, as its server answers it (rpc/server.py): whether a session begins."""
    if struct.unpack("<i", base.recvall(connection, 4))[0] != base.RPC_MAGIC:
        return False
    client = base.recvall(connection, struct.unpack("<i", base.recvall(connection, 4))[0]).decode()
    if client.split()[0] != f"client:{key}":
        connection.sendall(struct.pack("<i", base.RPC_CODE_MISMATCH))
        return False
    name = f"server:{key}".encode()
    connection.sendall(struct.pack("<i", base.RPC_CODE_SUCCESS) + struct.pack("<i", len(name)) + name)
    return True


if __name__ == "__main__":
    main()
