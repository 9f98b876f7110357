"""The address of the server, bound before anything is loaded."""

import contextlib
import errno
import socket

from service.errors import StartError


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind the address, one socket for each family, without listening yet. Raises StartError if it is not free.

    Connections are refused until the server listens.
    """
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                bound = opened.enter_context(socket.socket(family))
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a restart
                if family == socket.AF_INET6:
                    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                bound.bind((address[0], sockets[0].getsockname()[1], *address[2:]) if sockets and not port else address)
                sockets.append(bound)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                fix = "another process listens there; stop it, or give another --port"
            elif isinstance(error, PermissionError):
                fix = "this user may not use it; give a --port from 1024"
            else:
                fix = f"{error.strerror}; give the --host of an address of this machine"
            raise StartError(f"http.host and http.port: {host}:{port} cannot be used: {fix}") from None
        opened.pop_all()
    return sockets
