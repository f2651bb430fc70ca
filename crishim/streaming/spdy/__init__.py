"""SPDY/3.1 without I/O: bytes in, events out; what is to be sent is handed out as bytes.

Source: draft-mbelshe-httpbis-spdy-00 and its 3.1 revision (chromium.org, spdy-protocol-draft3-1), as far as
Kubernetes uses it: streams opened by the client, no HTTP semantics, no push, no credentials.
"""
