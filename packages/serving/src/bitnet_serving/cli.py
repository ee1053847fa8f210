"""`python -m bitnet_serving`, and what `wrinklefree export` is: names and options. Each command imports what
it needs, so `--help` answers at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from durable import ExitCode, UserError, error_line, mask_secrets

app = typer.Typer(
    name="bitnet_serving",
    help="Files for engines that run ternary models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
export_app = typer.Typer(
    name="export",
    help="Write a checkpoint for an engine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(export_app, name="export")


@export_app.command("gguf")
def export_gguf(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a checkpoint, or of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    body: Annotated[
        str | None,
        typer.Option("--type", help="Of the projections: tq2_0, tq1_0, q2_0, i2_s, f16, bf16 or q8_0."),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(help="f16, bf16, q8_0 or f32; else f16, or the body's own where it is one of them."),
    ] = None,
    head: Annotated[str | None, typer.Option(help="Of a head of its own; else that of --embeddings.")] = None,
    prefer: Annotated[
        str | None, typer.Option(help="Without --type: speed or size, among types that lose nothing.")
    ] = None,
    scales: Annotated[
        str, typer.Option(help="blocks: fp16, every engine reads them; tensors: exact, new engines only.")
    ] = "blocks",
    at_full_quantisation: Annotated[
        bool, typer.Option("--at-full-quantisation", help="Even if λ or μ is below 1: export what 1 is.")
    ] = False,
    dense_activations: Annotated[
        bool, typer.Option("--dense-activations", help="Even if activations are sparse: export without that.")
    ] = False,
    keep_mask: Annotated[
        bool, typer.Option("--keep-mask", help="Keep the row of [MASK] that block diffusion added.")
    ] = False,
    merge_lrc: Annotated[
        bool, typer.Option("--merge-lrc", help="Add low-rank corrections to the weights (f16, bf16, q8_0).")
    ] = False,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="OUT-lora.gguf", help="Write low-rank corrections as an adapter of their own."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another tokenizer than the checkpoint's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.gguf if it is there.")] = False,
    proven: Annotated[
        bool, typer.Option("--verify", help="Read it back and run it in an engine, as `verify` does.")
    ] = False,
) -> None:
    """A GGUF file for llama.cpp, or (i2_s, ReLU²) for Microsoft's engine.

    Nothing is rounded but scales, embeddings and head; widths that a type cannot hold are padded exactly.
    """
    from bitnet_serving.export import export_gguf as run

    report = run(
        checkpoint,
        out,
        body=body,
        embeddings=embeddings,
        head=head,
        prefer=prefer,
        scales=scales,
        at_full_quantisation=at_full_quantisation,
        dense_activations=dense_activations,
        keep_mask=keep_mask,
        merge_lrc=merge_lrc,
        lora=lora,
        tokenizer=tokenizer,
        replace_existing=force,
    )
    typer.echo(str(report))
    if proven:
        from bitnet_serving.verify import verify_gguf

        verification = verify_gguf(out, checkpoint, lora=lora)
        typer.echo(f"\n{verification}")
        raise typer.Exit(verification.exit_code)


PACKED = typer.Option("--packed", help="Codes and scales, four weights to a byte.")
AT_FULL = typer.Option("--at-full-quantisation", help="Even if λ or μ is below 1: export what 1 is.")


@export_app.command("hf")
def export_hf(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a checkpoint, or of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="The directory to write.")],
    packed: Annotated[bool, PACKED] = False,
    at_full_quantisation: Annotated[bool, AT_FULL] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT_DIR if an export is there.")] = False,
) -> None:
    """A directory that transformers loads with no code of ours, with a model card of the run's numbers."""
    from bitnet_serving.stock_export import export_hf as run

    report = run(
        checkpoint,
        out,
        packed=packed,
        at_full_quantisation=at_full_quantisation,
        replace_existing=force,
    )
    typer.echo(str(report))


@export_app.command("hub")
def export_hub(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a checkpoint, or of a run.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="On the hub; made if need be.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which files would go there; needs no network.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Where it has to be made, for yourself alone.")
    ] = False,
    packed: Annotated[bool, PACKED] = False,
    at_full_quantisation: Annotated[bool, AT_FULL] = False,
) -> None:
    """What `hf` writes, on the Hugging Face hub, by the token in HF_TOKEN or of `hf auth login`."""
    from bitnet_serving.hub import export_hub as run

    report = run(
        checkpoint,
        repository,
        dry_run=dry_run,
        private=private,
        packed=packed,
        at_full_quantisation=at_full_quantisation,
    )
    typer.echo(str(report))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to prove.")],
    checkpoint: Annotated[
        Path, typer.Option(metavar="DIR", help="The checkpoint, or the run, that it was exported from.")
    ],
    lora: Annotated[
        Path | None, typer.Option(metavar="OUT-lora.gguf", help="The adapter with its low-rank corrections.")
    ] = None,
    positions: Annotated[int, typer.Option(help="Predictions to compare.")] = 256,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to predict, in place of a page of English.")
    ] = None,
    require_engine: Annotated[
        bool, typer.Option("--require-engine", help="Fail where no engine here runs the type.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Of the engine.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Prove that a file says what a checkpoint says, and that an engine computes with it what PyTorch does.

    Exit code 0 when both hold, 4 when not.
    """
    from bitnet_serving.verify import verify_gguf

    verification = verify_gguf(
        path,
        checkpoint,
        require_engine=require_engine,
        positions=positions,
        lora=lora,
        text=None if text is None else read_text(text),
        threads=threads,
    )
    typer.echo(verification.to_json() if as_json else str(verification))
    raise typer.Exit(verification.exit_code)


def read_text(path: Path) -> str:
    """A file of text; UserError when it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as text", type(error).__name__, "name a file of UTF-8 text"
        ) from None


@app.command()
def sizes(
    checkpoint_dir: Annotated[Path, typer.Argument(help="The directory of a checkpoint.")],
) -> None:
    """What a checkpoint weighs, by part and by format; from the headers alone."""
    from bitnet_serving.sizes import read_sizes

    typer.echo(str(read_sizes(checkpoint_dir)))


def main(run: Callable[..., object] = app, argv: list[str] | None = None) -> int:
    """Run one command; the exit code. What a person can put right is one line."""
    try:
        code = run(argv, prog_name="python -m bitnet_serving", standalone_mode=False)
    except typer.TyperException as error:
        wrong = UserError(error.format_message().rstrip("."), fix="see `python -m bitnet_serving --help`")
        print(error_line(wrong), file=sys.stderr)
        return wrong.exit_code
    except UserError as error:
        print(error_line(error), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(mask_secrets(error_line(error)), file=sys.stderr)
        return ExitCode.CANNOT_WRITE
    return code if isinstance(code, int) else 0
