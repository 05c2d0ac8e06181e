"""Optional dependencies, asked for only where a data set needs them."""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Import ``module``.

    Args:
        module: name to import.
        package: what pip calls it.
        purpose: what needs it, for the message.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs {package}, which is not installed: pip install 'swat_ext[train]', or {package} alone",
            name=error.name,
        ) from None
