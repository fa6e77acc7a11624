"""A local server of graph files and their page, for this machine alone."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class Server(ThreadingHTTPServer):
    """A server that runs until `stop`."""

    def stop(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


def serve(data_dir: str | Path, frontend_dir: Any = None, port: int = 8032) -> Server:
    """Serve the folder of `create_graph_files` at http://localhost:PORT."""
    server = Server(("127.0.0.1", port), partial(_Quiet, directory=str(Path(data_dir).resolve())))
    Thread(target=server.serve_forever, daemon=True).start()
    return server
