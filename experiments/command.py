"""A command whose settings are words."""

from itertools import pairwise

import click
from typer.core import TyperCommand

from fedkd.errors import FedkdError


class WithSettings(TyperCommand):
    """Tells whoever writes a setting as an option how it is written."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of a command line.

        Raises:
            FedkdError: a setting has dashes before it.
        """
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from experiments.launch.presets import PRESET
            from fedkd.settings.config import RunConfig

            key = error.option_name.lstrip("-")
            if key not in (*RunConfig().to_mapping(), PRESET):
                raise
            values = [after for word, after in pairwise(words) if word == f"--{key}"]
            values += [word.partition("=")[2] for word in words if word.startswith(f"--{key}=")]
            value = values[0] if values else "VALUE"
            raise FedkdError(f"There is no option --{key}: settings are words, `{key}={value}`.") from error
