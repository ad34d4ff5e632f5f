"""Train the same module from a YAML file.

    python examples/cli.py                                 # fit with quickstart.yaml
    python examples/cli.py --fast --trainer.plugins.r=8    # anything in the file can be overridden

QLoRA is the `plugins` entry of the file; the Python code does not mention it.
"""

import argparse
import sys
import warnings
from pathlib import Path

from causal_lm import CausalLM
from docstring_qa import DocstringQA
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

HERE = Path(__file__).parent


class CLI(LightningCLI):
    """LightningCLI that passes the name of the model to the data module, which loads its tokenizer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.base", "data.base")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        with warnings.catch_warnings():
            # `main` builds args from the command line, so the warning is expected.
            warnings.filterwarnings("ignore", ".*both args and command line arguments.*")
            super().parse_arguments(parser, args)


def configs(fast: bool) -> list[str]:
    """List the YAML files to read; a later file overrides an earlier one."""
    return [f"--config={HERE / name}" for name in ("quickstart.yaml", "fast.yaml")[: 1 + fast]]


def main(args: list[str] | None = None) -> CLI:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--fast", action="store_true")
    options, rest = parser.parse_known_args(sys.argv[1:] if args is None else args)
    return CLI(CausalLM, DocstringQA, args=["fit", *configs(options.fast), *rest], save_config_callback=None)


if __name__ == "__main__":
    main()
