"""From the decoder module to an ExecuTorch program: export, partition, lower, plan the memory."""

from __future__ import annotations

import copy
import gc
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..shared.artifact import quiet
from .model import Decoder, Linear
from .session import ALL, CHUNK, PREFILL, ROWS

if TYPE_CHECKING:
    import torch
    from executorch.exir import ExecutorchProgramManager
    from executorch.exir.backend.partitioner import Partitioner
    from torch.export import ExportedProgram

_HEAVY = {"linear", "addmm", "mm", "bmm", "matmul", "convolution"}


@dataclass(frozen=True)
class Lowered:
    """A program whose matrices are stand-ins, and what became of its operators."""

    manager: ExecutorchProgramManager
    delegates: int
    """Calls into the backend's own graphs by ``forward``."""
    delegated: dict[str, int]
    """How many nodes of each operator the backend runs."""
    undelegated: dict[str, int]

    @property
    def heavy(self) -> list[str]:
        """Matrix products that the backend does not run."""
        return [name for name in self.undelegated if name.split(".")[-1] in _HEAVY]


def lower(decoder: Decoder, backend: str, constants: Mapping[str, object]) -> Lowered:
    """Lower both methods: ``forward``, logits of the last token, and ``all_logits``, which share cache and weights.

    Args:
        backend: ``cpu``, which is XNNPACK, or ``vulkan``.
        constants: methods of the program that return a constant, for the runners of apps.
    """
    from executorch.exir import (
        EdgeCompileConfig,
        EdgeProgramManager,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes.memory_planning_pass import MemoryPlanningPass

    with quiet(), _seldom_collected():
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        forward = to_edge_transform_and_lower(
            _export(decoder), partitioner=[_partitioner(backend)], compile_config=config
        ).exported_program()
        delegates, delegated, undelegated = _count(forward)
        # Vulkan takes the step behind which the methods part; nothing verifies its programs here.
        programs = {PREFILL: forward} | ({ALL: _of_all(forward)} if backend == "cpu" else {})
        edge = EdgeProgramManager(programs, dict(constants), config)
        planning = MemoryPlanningPass(alloc_graph_input=False, share_mutable_buffers=True)
        manager = edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=planning, emit_mutable_buffer_names=True, sym_shape_eval_pass=_bounds()
            )
        )
    return Lowered(manager, delegates, delegated, undelegated)


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Passes make millions of small objects that refer to each other: looking for garbage as often as Python does took
    a quarter of their time."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _export(decoder: Decoder) -> ExportedProgram:
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 - registers llama::custom_sdpa
    import torch
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 - embedding_byte
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - quantized_decomposed

    most = min(CHUNK, decoder.context_length)
    ids = torch.zeros(1, min(8, most), dtype=torch.long)
    shapes = {"tokens": {1: torch.export.Dim("tokens", min=1, max=most)}, "input_pos": None}
    with torch.no_grad():
        program = torch.export.export(decoder, (ids, torch.zeros(1, dtype=torch.long)), dynamic_shapes=shapes)
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and module.stored is not None:
            program.state_dict[f"{name}.weight"] = module.stored
    for node in program.graph.nodes:  # every pass copies where a node came from, and that grows with every pass
        for key in ("from_node", "nn_module_stack", "stack_trace"):
            node.meta.pop(key, None)
    return program


def _of_all(forward: ExportedProgram) -> ExportedProgram:
    """The lowered program without the step that keeps the last token alone: lowering twice would take twice as long,
    and the backend's graphs take any number of tokens."""
    from torch.utils._pytree import tree_map

    tensors = [*forward.state_dict.values(), *forward.constants.values()]
    program = copy.deepcopy(forward, {id(tensor): tensor for tensor in tensors})
    graph = program.graph
    slices = (node for node in graph.nodes if getattr(node.target, "__name__", "") == "aten.slice_copy.Tensor")
    (last,) = (node for node in slices if node.args[2] == -1)
    hidden = last.args[0]
    following = list(graph.nodes)[list(graph.nodes).index(last) + 1 :]
    last.replace_all_uses_with(hidden)
    graph.erase_node(last)
    count = hidden.meta["val"].shape[1]
    for node in following:
        node.meta.pop("spec", None)
        if "val" in node.meta:
            node.meta["val"] = tree_map(lambda t: t.new_empty(t.shape[0], count, t.shape[2]), node.meta["val"])
    program.graph_module.recompile()
    return program


def _bounds() -> dict[str, object]:
    """How many tokens memory is planned for, by method: the runtime fills all of it with zeros, and a row of logits is
    large."""
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from torch.utils._sympy.value_ranges import ValueRanges

    class _Rows(ConstraintBasedSymShapeEvalPass):
        def call(self, graph_module: Any) -> Any:
            (ids,) = (node for node in graph_module.graph.nodes if node.name == "tokens")
            count = ids.meta["val"].shape[1].node
            ranges, whole = count.shape_env.var_to_range, count.shape_env.var_to_range[count.expr]
            ranges[count.expr] = whole & ValueRanges(1, ROWS)
            try:
                return super().call(graph_module)
            finally:
                ranges[count.expr] = whole

    return {PREFILL: ConstraintBasedSymShapeEvalPass(), ALL: _Rows()}


def _partitioner(backend: str) -> Partitioner:
    if backend == "vulkan":
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner({"require_dynamic_shapes": True})
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
    from executorch.exir.backend.utils import tag_constant_data

    class _Partitioner(XnnpackPartitioner):
        """XNNPACK's own rules of what it runs, in as few graphs as there are attentions between them; its own grouping
        makes two to three a layer."""

        def __init__(self) -> None:
            super().__init__()
            # This key leaves out all of the backend's passes but one; this model needs none of the others.
            self.delegation_spec = DelegationSpec("XnnpackBackend", [CompileSpec("dqlinear_partitioner", b"")])

        def ops_to_not_decompose(
            self, ep: ExportedProgram
        ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
            """Its own, of which it runs each as this model has it: asked node by node, lowering would trace the graph
            twice more."""
            return super().ops_to_not_decompose(ep)[0], None

        def partition(self, exported_program: ExportedProgram) -> PartitionResult:
            taken = {node for group in self.get_matched_nodes_from_configs(exported_program) for node in group}
            nodes = [node for node in exported_program.graph.nodes if node.op == "call_function"]
            place: dict[Any, int] = {}
            for node in nodes:
                before = [place[n] + (n in taken and node not in taken) for n in node.all_input_nodes if n in place]
                if before or any(n.op != "placeholder" for n in node.all_input_nodes) or node not in taken:
                    place[node] = max(before, default=0)
            for node in reversed(nodes):  # what has constant inputs alone goes where it is wanted
                if node not in place:
                    place[node] = min(place[user] for user in node.users)
            for node in nodes:
                if node in taken:
                    node.meta["delegation_tag"] = f"{place[node]:06}"
            _retype_constants(exported_program)
            tag_constant_data(exported_program)
            tags = {f"{place[node]:06}" for node in nodes if node in taken}
            return PartitionResult(exported_program, dict.fromkeys(sorted(tags), self.delegation_spec))

    return _Partitioner()


def _retype_constants(program: ExportedProgram) -> None:
    """Let the graph tell the dtypes of its constants as they are by now."""
    for node in program.graph.nodes:
        name = program.graph_signature.inputs_to_buffers.get(node.name)
        if name in program.state_dict:
            node.meta["val"] = node.meta["val"].to(program.state_dict[name].dtype)


def _count(program: ExportedProgram) -> tuple[int, dict[str, int], dict[str, int]]:
    """Number of delegates, and nodes by operator inside and outside them."""
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    delegates = 0
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target.startswith("lowered_module"):
            delegates += 1
            lowered = getattr(program.graph_module, node.target).original_module
            inside.update(_names(lowered.graph))
    outside.update(name for name in _names(program.graph) if "call_delegate" not in name)
    return delegates, dict(sorted(inside.items())), dict(sorted(outside.items()))


def _names(graph: Any) -> Iterator[str]:
    """Operators of a graph as ``namespace.name``."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            schema = getattr(node.target, "_schema", None)
            yield schema.name.replace("::", ".") if schema else node.target.__name__
