"""``optimum-cli export edgekd MODEL OUT``: edgekd's exporters at the door that Hugging Face's users know.

Installed as ``optimum/commands/register/register_edgekd.py``, a namespace that optimum searches; optimum imports this
file on every call, so it imports nothing heavy itself.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class EdgekdExportCommand(BaseOptimumCLICommand):
    """The options of ``edgekd export``."""

    COMMAND = CommandInfo(name="edgekd", help="Export a Llama, Qwen2 or Qwen3 model to on-device runtimes by edgekd.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare them."""
        parser.add_argument("model", help="A model folder, builtin:NAME or hub:ORGANISATION/NAME.")
        parser.add_argument("out", type=Path, help="Folder to write the artifact to; must not exist.")
        parser.add_argument("--target", required=True, help="The runtime; edgekd doctor lists them.")
        parser.add_argument("--recipe", required=True, help="One of the target's, such as fp16 or portable-int4.")
        parser.add_argument("--context", type=int, help="Context length. Default: the model's.")
        parser.add_argument(
            "--provider",
            action="append",
            help="Execution provider, the preferred first, for a target that has them.",
        )
        parser.add_argument(
            "--quantized", type=Path, help="A quantized student whose integers to pack. Default: round to nearest."
        )
        parser.add_argument(
            "--moments", type=Path, help="Second moments from a run's calibration, where a recipe asks."
        )

    def run(self) -> None:
        """Export; what a user can mend is one sentence on stderr and exit code 2."""
        from edgekd.errors import EdgekdError
        from edgekd.spec import of_options
        from edgekd.student import resolve_model
        from edgekd.targets import export, load_target

        args = self.args
        try:
            given = {"target": args.target, "recipes": [args.recipe]}
            own = load_target(args.target).Options
            spec = of_options(own, **given, context=args.context, providers=args.provider)
            folder = resolve_model(args.model)
            artifact = export(
                folder,
                spec,
                args.recipe,
                args.out,
                name=folder.resolve().name,
                quantized=args.quantized,
                moments=args.moments,
            )
        except EdgekdError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        print(
            f"{args.out}: {artifact.size_bytes / 1e6:.1f} MB, {artifact.manifest.bits_per_weight:.2f} bits per weight"
        )


REGISTER_COMMANDS = [(EdgekdExportCommand, ExportCommand)]
