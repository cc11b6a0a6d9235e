"""Numbers only: grids and solvers. Never opens a file."""
