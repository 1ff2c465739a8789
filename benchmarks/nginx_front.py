"""Several servers behind nginx, as one server to be measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from servers import Command, RunningServer, free_port

_CONFIG = """\
daemon off;
pid {home}/pid;
error_log stderr crit;
worker_processes 1;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    upstream servers {{ least_conn; {servers} }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://servers;
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


class NginxFront:
    """Starts the servers, waits for each of them, and starts nginx before them.

    Args:
        nginx: the program.
    """

    def __init__(self, nginx: Path, commands: list[Command]) -> None:
        self._servers: list[RunningServer] = []
        self._home = tempfile.TemporaryDirectory(prefix="nginx-bench-")
        try:
            for command in commands:
                self._servers.append(RunningServer(command))
            for server in self._servers:
                server.wait_for_first_token()
            self.server = RunningServer(self._command(nginx, commands))
            self._servers.append(self.server)
            self.server.wait_for_first_token()
        except BaseException:
            self._stop()
            raise

    def _command(self, nginx: Path, commands: list[Command]) -> Command:
        port, home = free_port(), Path(self._home.name)
        config = home / "nginx.conf"
        ports = " ".join(f"server 127.0.0.1:{command.port};" for command in commands)
        config.write_text(_CONFIG.format(home=home, servers=ports, port=port))
        arguments = [str(nginx), "-p", str(home), "-c", str(config)]
        return Command("nginx", arguments, port, commands[0].model)

    def _stop(self) -> None:
        for server in self._servers:
            server.stop()
        self._home.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
