"""A Core ML package run on any machine: its MIL program interpreted operator by operator, in torch.

The graph and the weights are the package's own, as Core ML would load them; the arithmetic is this package's. So it
proves what a package computes, and says nothing of Apple's compiler, of the Neural Engine or of speed on a device.
Beside torch and numpy it needs only coremltools' protobuf classes, and no Mac.

    package.py   the folder: manifest, model specification, which weight files it may name
    weights.py   the weight file: header, metadata, sub-byte integers
    ops.py       one function per operator, and the table of them
    parse.py     the program as protobuf has it → checked steps
    program.py   the interpreter
"""

from .parse import Feature
from .program import Interpreter

__all__ = ["Feature", "Interpreter"]
