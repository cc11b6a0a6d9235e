"""Target runtimes behind one protocol."""
