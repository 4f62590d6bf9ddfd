"""What other projects wrote: nano4M's configurations and checkpoints."""
