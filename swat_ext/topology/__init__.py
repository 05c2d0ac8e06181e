"""Who decides what is kept: budgets, the selection of what is largest, and methods that hold a pattern."""

from swat_ext.topology.methods import METHODS, SET, Method, RigL, Static

__all__ = ["METHODS", "SET", "Method", "RigL", "Static"]
