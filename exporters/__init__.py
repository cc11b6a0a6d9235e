"""One file a target: from a checkpoint, a recipe and a grid to an artifact."""
