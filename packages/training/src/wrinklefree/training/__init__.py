"""What a run is made of beside model and losses: its directory, checkpoints, metrics, data and signals."""
