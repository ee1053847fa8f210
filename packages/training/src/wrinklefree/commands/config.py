"""`wrinklefree config`: the whole configuration of a run, whether it holds, and what every key means."""

from wrinklefree.config import load_config, to_yaml
from wrinklefree.config.describe import described_keys


def show(overrides: list[str]) -> None:
    """Print all keys with the values that they would have."""
    print(to_yaml(load_config(overrides)), end="")


def validate(overrides: list[str]) -> None:
    """One line when it holds; UserError names what does not."""
    config = load_config(overrides)
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps
    length, steps = config.training.max_seq_length, config.max_steps
    name, stage = config.model.name, config.training.stage.value
    tokens = steps * per_step * length
    print(f"valid: {name}, {stage}, {steps:,} steps of {per_step} × {length} tokens ({tokens:,})")


def schema() -> None:
    """Print every key: what is accepted, its default, what it is for."""
    for key in described_keys():
        print(f"{key.name}: {key.accepted} = {key.default!r}")
        if key.meaning:
            print(f"    {key.meaning}")
