"""Names of runs, against those that the documents of this project promise."""

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from wrinklefree.config import load_config
from wrinklefree.training.run_naming import (
    generate_benchmark_name,
    generate_moe_benchmark_name,
    generate_run_name,
)


def hydra_config(**optimizer: Any) -> Any:
    return OmegaConf.create(
        {
            "model": {"name": "qwen3_4b"},
            "training": {
                "stage": "continue_pretrain",
                "optimizer": {"type": "muonclip", "lr": 2.4e-3} | optimizer,
                "batch_size": 16,
                "gradient_accumulation_steps": 4,
            },
        }
    )


def test_the_promised_names_but_for_their_random_end() -> None:
    names = (
        generate_run_name(hydra_config()),
        generate_benchmark_name("bitnet-2b", "i2_s", 4096, 16),
        generate_moe_benchmark_name("bitnet-2b", 8, 2, "i2_s", 4096, 16),
    )

    assert all(re.fullmatch(r"[0-9a-f]{3}", name.rpartition("-")[2]) for name in names)
    assert [name.rpartition("-")[0] for name in names] == [
        "qwen3_4b-s2-muon-lr2.4e3-bs64",
        "bn2b-i2s-ctx4096-t16",
        "bn2b-moe8k2-i2s-ctx4096-t16",
    ]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(2.4e-3, "lr2.4e3"), (5e-5, "lr5.0e5"), (1.25e-3, "lr1.25e3"), (2400.0, "lr2.4e+3"), (1, "lr1.0e+0")],
)
def test_different_learning_rates_have_different_names(rate: float, text: str) -> None:
    assert f"-{text}-" in generate_run_name(hydra_config(lr=rate))


def test_a_run_of_ours_is_named_after_the_learning_rate_of_its_optimizer() -> None:
    overrides = ["model=tiny_llama", "training=stage2_pretrain", "training.optimizer.lr_muon=0.02"]
    muon = generate_run_name(load_config(overrides))
    adam = generate_run_name(load_config([*overrides, "training.optimizer.type=adamw"]))

    assert muon.rpartition("-")[0] == "tiny_llama-s2-muon-lr2.0e2-bs8"
    assert adam.rpartition("-")[0] == "tiny_llama-s2-adam-lr5.0e5-bs8"


def test_a_long_name_keeps_its_end_and_what_is_missing_is_a_question_mark() -> None:
    tree = OmegaConf.create({"model": {"name": "m" * 200}})

    assert re.fullmatch(r"m{27}-[0-9a-f]{4}", generate_run_name(tree, max_length=32, suffix_length=4))
    assert generate_run_name({}).startswith("?-?-?-lr?-bs?-")


def test_the_tracker_is_found_where_earlier_documents_import_it_from() -> None:
    from benchmark.core.wandb_tracker import WandBTracker, create_inference_tracker

    from wrinklefree.training import wandb_tracker

    assert (WandBTracker, create_inference_tracker) == (
        wandb_tracker.WandBTracker,
        wandb_tracker.create_inference_tracker,
    )
