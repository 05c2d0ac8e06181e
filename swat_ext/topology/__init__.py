"""Who decides what is kept: budgets, and the selection of what is largest."""
