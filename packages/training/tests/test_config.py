"""A configuration is right or one line: key, place, what was found, what is accepted."""

import pytest
import yaml

from durable import UserError
from wrinklefree.config import CONFIG_DIR, group_options, load_config, schema_keys, to_dict, to_yaml


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainig.max_steps=3", ["trainig.max_steps", "did you mean 'training.max_steps'"]),
        ("training.max_stepz=3", ["did you mean 'training.max_steps'"]),
        ("modle=tiny_llama", ["did you mean 'model'"]),
        ("training=unifed", ["training", "did you mean 'unified'"]),
        ("training.max_steps=1e3x", ["training.max_steps", "1e3x", "whole number", "command line"]),
        ("training.max_steps=0", ["training.max_steps", "found 0", "1 or more"]),
        ("training.max_steps=-1", ["training.max_steps", "found -1", "1 or more"]),
        ("training.max_steps=.nan", ["training.max_steps", "whole number"]),
        ("training.optimizer.lr_muon=1e999", ["training.optimizer.lr_muon", "inf"]),
        ("training.optimizer.lr_muon=.nan", ["training.optimizer.lr_muon", "number"]),
        ("training.precision=fp8", ["training.precision", "fp32 | bf16"]),
        ("experiment_name=${oc.env:WRINKLEFREE_TEST_UNSET}", ["experiment_name", "WRINKLEFREE_TEST_UNSET"]),
        ("seed=${seed}", ["seed", "ecursive"]),
        ("experiment_name=a/b", ["experiment_name", "a/b"]),
        ("training.objectives.logit_distill.weight=1", ["did you mean 'logits_distill'"]),
        ("training.objectives.continue_pretrain.weight=-1", ["continue_pretrain.weight", "-1"]),
        ("training.objectives.continue_pretrain.wieght=1", ["did you mean 'weight'"]),
        ("seed", ["KEY=VALUE"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config([override])

    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    assert [part for part in parts if part not in text] == []


def test_a_ramp_that_a_person_wrote_must_end_within_the_run() -> None:
    with pytest.raises(UserError, match=r"200 steps, training.max_steps=100"):
        load_config(["training.max_steps=100", "training.lambda_warmup.warmup_steps=200"])


def test_a_mistake_in_a_file_names_its_line(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = CONFIG_DIR / "training" / "unified.yaml"
    line = 1 + next(n for n, text in enumerate(path.read_text().splitlines()) if text.startswith("max_seq"))

    # Longer than any number of tokens could be negative: the value of the file, refused by its own key.
    with pytest.raises(UserError) as caught:
        load_config(["training=unified", "training.lambda_warmup.share=2"])
    assert "on the command line" in str(caught.value)

    from wrinklefree.config.loading import _place_of

    assert _place_of("training.max_seq_length", ["training=unified"]) == f"unified.yaml:{line}"


@pytest.mark.parametrize("preset", group_options("training"))
@pytest.mark.parametrize("max_steps", [1, 2, 7, 100_000])
def test_every_preset_holds_at_any_length_and_ends_fully_ternary(preset: str, max_steps: int) -> None:
    config = load_config([f"training={preset}", f"training.max_steps={max_steps}"])

    assert config.training.lambda_warmup.steps(config.max_steps) < config.max_steps or max_steps == 1
    assert config.max_steps == max_steps


@pytest.mark.parametrize("model", group_options("model"))
def test_every_model_composes(model: str) -> None:
    assert load_config([f"model={model}"]).model.name == model


def test_steps_follow_from_tokens_when_nobody_gave_them() -> None:
    config = load_config(
        ["training.total_tokens=1000000", "training.batch_size=4", "training.max_seq_length=96"]
    )

    assert config.max_steps == 1_000_000 // (4 * 16 * 96)


def test_output_dir_may_stand_under_training() -> None:
    assert load_config(["training.output_dir=/somewhere"]).output_dir == "/somewhere"


def test_what_is_written_out_is_the_whole_tree_and_reads_back() -> None:
    config = load_config(["experiment=quick"])

    written = yaml.safe_load(to_yaml(config))

    assert written["training"]["influence"]["update_interval"] == 3
    assert {key.split(".")[0] for key, _, _ in schema_keys()} == set(written)
    assert to_dict(config)["experiment_name"] == "quick"


def test_an_objective_can_be_added_by_naming_it() -> None:
    config = load_config(["training=base", "training.objectives.logits_distill.weight=0.25"])

    assert config.training.objectives["logits_distill"]["weight"] == 0.25
    assert config.training.objectives["continue_pretrain"]["weight"] == 1.0


STAGES = {
    "unified": "unified",
    "base": "base",
    "stage1_subln": "stage1",
    "stage1_9_layerwise": "stage1_9",
    "stage2_pretrain": "stage2",
    "stage3_distill": "stage3",
    "bitdistill_full": "bitdistill",
    "lrc_calibration": "lrc",
}


def test_each_preset_has_the_directory_of_its_stage() -> None:
    found = {name: load_config([f"training={name}"]) for name in group_options("training")}

    assert {name: config.training.stage.value for name, config in found.items()} == STAGES


@pytest.mark.parametrize("gpu", group_options("gpu"))
@pytest.mark.parametrize("model", ["smollm2_135m", "qwen3_4b"])
@pytest.mark.parametrize("stage", ["stage1_9_layerwise", "stage2_pretrain"])
def test_a_gpu_profile_makes_steps_of_64_blocks(gpu: str, model: str, stage: str) -> None:
    training = load_config([f"gpu={gpu}", f"model={model}", f"training={stage}"]).training

    assert training.batch_size * training.gradient_accumulation_steps == 64


def test_a_gpu_profile_gives_the_batch_of_model_and_stage_unless_somebody_wrote_one() -> None:
    def sizes(*overrides: str) -> tuple[int, int]:
        training = load_config(["+gpu=a100_80gb", *overrides]).training
        return training.batch_size, training.gradient_accumulation_steps

    stage2, tiny = ["model=qwen3_4b", "training=stage2_pretrain"], "model=tiny_llama"
    assert sizes(*stage2) == (16, 4)  # the earlier system's table
    assert sizes("model=qwen3_4b", "training=stage1_9_layerwise") == (8, 8)
    assert sizes(*stage2, "training.batch_size=2") == (2, 32)
    assert sizes(*stage2, "training.gradient_accumulation_steps=3") == (16, 3)
    with pytest.raises(UserError, match=r"a100_80gb has no batch for this model .*found tiny_llama\)"):
        sizes(tiny)
    assert sizes(tiny, "training.batch_size=4", "training.gradient_accumulation_steps=1") == (4, 1)


def test_a_number_for_gradient_clipping_is_the_fixed_norm() -> None:
    assert load_config(["training.gradient_clipping=0.5"]).training.gradient_clipping.max_norm == 0.5
    assert load_config(["resume.checkpoint_path=x"]).training.resume.checkpoint_path == "x"
