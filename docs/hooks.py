"""A hook of mkdocs, named in mkdocs.yml."""

from typing import Any

from lightning_qlora import __version__


def on_config(config: Any) -> None:
    """Show the version in the title of the site."""
    config.site_name += f" {__version__}"
