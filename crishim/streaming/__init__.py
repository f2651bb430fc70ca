"""Exec, attach and port-forward for clients: SPDY/3.1 and WebSocket, single-use tokens, one server."""
