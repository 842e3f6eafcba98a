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
        parser.add_argument("--target", required=True, help="gguf, onnx, coreml or executorch.")
        parser.add_argument("--recipe", required=True, help="One of the target's, such as fp16 or portable-int4.")
        parser.add_argument("--context", type=int, help="Context length. Default: the model's.")
        parser.add_argument(
            "--provider",
            action="append",
            help="Execution provider of onnx, the preferred first; or of executorch, its one. Default: cpu.",
        )
        parser.add_argument("--grid", type=Path, help="A quantized student whose integers to pack. Default: round.")
        parser.add_argument(
            "--moments", type=Path, help="Second moments from a run's calibration, where a recipe asks."
        )

    def run(self) -> None:
        """Export; what a user can mend is one sentence on stderr and exit code 2."""
        from edgekd.errors import EdgekdError
        from edgekd.spec import TargetSpec
        from edgekd.student import resolve_model
        from edgekd.targets import export

        args = self.args
        try:
            if args.context is not None and args.context < 1:
                raise EdgekdError(f"--context {args.context}: not a length.", "Give a positive number.")
            folder = resolve_model(args.model)
            spec = TargetSpec(
                target=args.target, recipes=[args.recipe], context=args.context, providers=args.provider or ["cpu"]
            )
            artifact = export(
                folder, spec, args.recipe, args.out, name=folder.resolve().name, grid=args.grid, moments=args.moments
            )
        except EdgekdError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        print(
            f"{args.out}: {artifact.size_bytes / 1e6:.1f} MB, {artifact.manifest.bits_per_weight:.2f} bits per weight"
        )


REGISTER_COMMANDS = [(EdgekdExportCommand, ExportCommand)]
