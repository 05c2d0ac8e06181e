"""BatchNorm and the ReLU that follows it in one pass over memory.

Which ReLU follows which BatchNorm is read off the network's graph, traced once by :mod:`torch.fx`; a network that
cannot be traced keeps them apart. What is found is a guess, for a forward may take another way the next time, or be
changed: :mod:`swat_ext.modules.rectified` makes every other reader of the BatchNorm's output see what it should.
"""

import random

import torch
from torch import fx, nn

from swat_ext.inspect.shapes import copy_model, on_meta
from swat_ext.modules.batch_norm import SWATBatchNorm2d
from swat_ext.modules.relu import SWATReLU

__all__ = ["fuse_relus"]


class _Tracer(fx.Tracer):
    """Looks into every module that has children, and into no other."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not any(True for _ in module.children())


def fuse_relus(model: nn.Module) -> tuple[str, ...]:
    """Let every :class:`SWATBatchNorm2d` whose output goes into a :class:`SWATReLU` alone compute both.

    Args:
        model: a network whose layers are swapped already; its forward is traced on a copy without values, and the
            random states of Python and of torch's CPU generator are left as they were.

    Returns:
        Names of the batch normalisations that do so now; empty where the network cannot be traced.
    """
    if not any(isinstance(module, SWATBatchNorm2d) for module in model.modules()):
        return ()
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(copy_model(model, on_meta))
    except Exception:  # whatever a forward does with what is no tensor
        return ()
    finally:
        random.setstate(state)
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(model.get_submodule(str(node.target)), []).append(node)
    fused = []
    for name, module in model.named_modules():
        if isinstance(module, SWATBatchNorm2d) and module in calls:
            module._rectifies = all(_feeds_relu_alone(model, node) for node in calls[module])
            if module._rectifies:
                fused.append(name)
    return tuple(fused)


def _feeds_relu_alone(model: nn.Module, node: fx.Node) -> bool:
    if len(node.users) != 1:
        return False
    user = next(iter(node.users))
    return (
        user.op == "call_module"
        and isinstance(model.get_submodule(str(user.target)), SWATReLU)
        and user.args == (node,)
        and not user.kwargs
    )
