"""The ``crishim`` command."""

from __future__ import annotations

import sys

import click

import crishim
from crishim.cli.check import check
from crishim.cli.config import config
from crishim.cli.demo import demo
from crishim.cli.serve import serve
from crishim.errors import CrishimError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(crishim.__version__, prog_name="crishim")
def cli() -> None:
    """A Kubernetes node's container runtime: CRI over runc, crun and conmon."""


cli.add_command(serve)
cli.add_command(config)
cli.add_command(check)
cli.add_command(demo)


def main() -> None:
    """Run the command line; an error that is the user's to mend is one line, without a traceback."""
    try:
        cli()
    except CrishimError as err:
        click.echo(f"crishim: {err.message}", err=True)
        sys.exit(1)
