"""The mark on a tensor that its ReLU has been computed already, by the layer that made it."""

from torch import Tensor

__all__ = ["arrived", "mark"]

_ATTRIBUTE = "_swat_rectified"


def mark(tensor: Tensor) -> list[bool]:
    """Mark ``tensor``; the result says, in its only element, whether a ReLU has seen the mark."""
    seen = [False]
    setattr(tensor, _ATTRIBUTE, (seen, tensor._version))
    return seen


def arrived(tensor: Tensor) -> bool:
    """Whether ``tensor`` bears a mark and is as it was; tells its maker so."""
    seen, version = getattr(tensor, _ATTRIBUTE, (None, -1))
    if seen is None or version != tensor._version:
        return False
    seen[0] = True
    return True
