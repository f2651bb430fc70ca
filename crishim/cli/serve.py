"""``crishim serve``: the daemon."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys

import click

from crishim.cli.options import with_config
from crishim.config.settings import Config
from crishim.cri import node as nodes
from crishim.cri.server import listen, server
from crishim.observe import log, metrics

_log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0


@click.command()
@with_config
def serve(settings: Config) -> None:
    """Serve the CRI until SIGTERM. Containers go on running without the daemon."""
    log.set_up(settings.log)
    asyncio.run(_serve(settings))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # everything is closed: threads that a hung file system or registry holds are not waited for


async def _serve(settings: Config) -> None:
    node = nodes.build(settings)
    try:
        await nodes.start(node)
        made = server(node)
        address = listen(made, settings.api)
        if settings.metrics.listen:
            metrics.serve(settings.metrics.listen)
        asked_to_end = _signalled()  # before anybody can know that we serve
        await made.start()
        gc.collect()
        gc.freeze()  # what start-up made stays: later collections need not look at it
        click.echo(f"serving CRI v1 on {address}")
        notify("READY=1")
        await asked_to_end.wait()
        notify("STOPPING=1")
        _log.info("finishing the calls under way")
        await node.streams.stop()  # sessions may be endless
        await made.stop(GRACE_SECONDS)
    finally:
        await nodes.stop(node)
        _log.info("stopped; containers go on running")


def _signalled() -> asyncio.Event:
    """Set by the signals that end the daemon."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, asked.set)
    return asked


def notify(message: str) -> None:
    """Tell systemd, if it asked to be told: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as err:
            _log.warning("cannot notify systemd: %s", err.strerror)
