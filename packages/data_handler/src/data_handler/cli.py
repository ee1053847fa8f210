"""`python -m data_handler`: list, show, prepare, preview, stats and verify data.

The libraries that read data are imported by the command that needs them, so `--help` answers at once.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data_handler.influence.commands import register
from durable import ExitCode, UserError, error_line, mask_secrets

app = typer.Typer(
    name="data",
    help="Prepare training data and look at it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigName = Annotated[str, typer.Argument(help="A shipped config (see `list`), or the path of a YAML file.")]
Tokenizer = Annotated[str, typer.Option(help="demo, a directory, or a model's name on the hub.")]


@app.command("list")
def list_configs() -> None:
    """The shipped configs."""
    from data_handler.config import list_available_configs, load_data_config

    for name in list_available_configs():
        config = load_data_config(name)
        typer.echo(f"{name:16} {len(config.sources)} sources  {config.description}")


@app.command()
def show(name: ConfigName) -> None:
    """Sources of a config, with weights, licences and probes."""
    from data_handler.config import load_data_config

    config = load_data_config(name)
    typer.echo(f"{config.name}: {config.description}")
    for key, source in config.sources.items():
        weight = config.weights.get(key, 0.0)
        subset = f" ({source.subset})" if source.subset else ""
        probe = f"probe 1 in {source.probe_one_in}" if source.probe_one_in else "no probe"
        address = mask_secrets(source.path)
        typer.echo(
            f"  {key:20} {weight:6.3f}  {source.format:8} {address}{subset}, {source.split}; "
            f"{source.domain}; {source.licence}; {probe}"
        )


@app.command()
def prepare(
    name: ConfigName,
    out: Annotated[
        Path | None, typer.Option(help="Where the shards go, a directory for each source; else data/NAME.")
    ] = None,
    tokenizer: Tokenizer = "demo",
    fast: Annotated[bool, typer.Option(help="Use the tiktoken core where it gives the same ids.")] = True,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that prepare; else one for each processor.")
    ] = None,
) -> None:
    """Turn the sources of a config into token shards; run again after a kill, it goes on from there."""
    from data_handler.config import load_data_config
    from data_handler.prepare import available_cpus
    from data_handler.prepare import prepare as prepare_sources
    from data_handler.progress import progress_bar

    config = load_data_config(name)
    target = out or Path("data") / config.name
    reports = prepare_sources(
        config,
        target,
        tokenizer=tokenizer,
        fast=fast,
        num_workers=available_cpus() if workers is None else workers,
        meter=progress_bar,
    )
    for report in reports:
        state = "was there" if report.was_there else "prepared"
        typer.echo(
            f"{report.name}: {state}, {report.num_tokens:,} tokens, {report.num_documents:,} documents, "
            f"{report.num_duplicates:,} duplicates, {len(report.bad_lines)} bad lines skipped"
        )


@app.command()
def preview(
    name: ConfigName,
    num: Annotated[int, typer.Option("-n", min=1, help="Documents of each source.")] = 5,
    tokenizer: Tokenizer = "demo",
) -> None:
    """Documents as training sees them: ends visible, and ~ under what no loss is asked for."""
    from data_handler.config import load_data_config
    from data_handler.encoder import load_encoder
    from data_handler.preview import preview_source

    config, encoder = load_data_config(name), load_encoder(tokenizer)
    for key in config.weights:
        typer.echo(f"── {key} " + "─" * 60)
        for text in preview_source(key, config, encoder, num):
            typer.echo(text)


@app.command()
def stats(directory: Annotated[Path, typer.Argument(help="What `prepare` wrote.")]) -> None:
    """Tokens, documents, document lengths and the share of each source."""
    from data_handler.statistics import describe

    typer.echo(describe(directory))


@app.command()
def verify(directory: Annotated[Path, typer.Argument(help="What `prepare` wrote.")]) -> None:
    """Read every byte back and compare it with the manifests."""
    from data_handler.statistics import source_dirs
    from durable import verify as verify_directory

    for source_dir in source_dirs(directory):
        manifest = verify_directory(source_dir)
        typer.echo(
            f"{source_dir.name}: {len(manifest.files)} files, {manifest.num_bytes:,} bytes, all as written"
        )


register(app)


def main(run: Callable[..., object] = app) -> None:
    """Run the command line; errors a user can meet are one line and their exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        code = run(prog_name="data_handler", standalone_mode=False)
    except typer.TyperException as error:
        wrong = UserError(error.format_message().rstrip("."), fix="see `python -m data_handler --help`")
        print(error_line(wrong), file=sys.stderr)
        sys.exit(wrong.exit_code)
    except UserError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(ExitCode.CANNOT_WRITE)
    sys.exit(code if isinstance(code, int) else 0)
